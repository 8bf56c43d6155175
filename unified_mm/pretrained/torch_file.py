"""Tensors of a file that torch.save wrote, read without torch and without running any code in it.

Such a file is a zip of the tensors' bytes and of a pickle that says how they are put together; up
to torch 1.5 it was some pickles, and the bytes after them. Only what a dictionary of tensors needs
is allowed in a pickle.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by name from here on
import numpy as np

# Their storages -> NumPy's name, and what safetensors calls the type.
STORAGES = {
    "FloatStorage": ("float32", "F32"),
    "HalfStorage": ("float16", "F16"),
    "BFloat16Storage": ("bfloat16", "BF16"),
    "DoubleStorage": ("float64", "F64"),
    "LongStorage": ("int64", "I64"),
    "IntStorage": ("int32", "I32"),
    "BoolStorage": ("bool", "BOOL"),
}

OLD_NUMBER = 0x1950A86A20F9469CFC6C  # what files of the old layout begin with
# What reading a damaged pickle may raise, beside its own error.
DAMAGES = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    ValueError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class Tensor:
    """A tensor within a file.

    Attributes:
      storage: name of its bytes, and the name of their type.
      offset: of its first number.
      shape, stride: its sizes, and the steps in numbers from one index to the next.
    """

    storage: tuple[str, str]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def get_dtype(self) -> str:
        """Returns its type, as safetensors calls it."""
        return STORAGES[self.storage[1]][1]


class TorchFile:
    """An opened file of tensors, with the methods of an opened safetensors file that are needed.

    Raises:
      ValueError: if it is no such file, or has other things in it than tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._store = (Zipped if zipfile.is_zipfile(path) else Pickles)(path)
            found = self._store.found
            if not isinstance(found, dict):
                raise ValueError(f"it is a {type(found).__name__}")
        except DAMAGES as error:
            raise ValueError(f"{path} holds no tensors that can be read safely: {error}") from error
        little = self._store.little_endian
        if not little or not all(isinstance(each, Tensor) for each in found.values()):
            raise ValueError(f"{path} holds other things than tensors by name, little-endian")
        self._tensors: dict[str, Tensor] = dict(found)

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def keys(self) -> Iterable[str]:
        """Returns the names of the tensors."""
        return self._tensors.keys()

    def get_slice(self, name: str) -> Tensor:
        """Returns a tensor that is not read yet."""
        return self._tensors[name]

    def get_tensor(self, name: str) -> Any:
        """Returns the numbers of a tensor.

        Raises:
          ValueError: if the file holds fewer.
        """
        found = self._tensors[name]
        key, kind = found.storage
        numbers = np.frombuffer(self._store.read(key), np.dtype(STORAGES[kind][0]))
        if min((found.offset, *found.shape, *found.stride), default=0) < 0:
            raise ValueError(f"{self._path}: {name} begins before the bytes that are there")
        last = sum((n - 1) * s for n, s in zip(found.shape, found.stride, strict=True))
        if 0 not in found.shape and found.offset + last >= len(numbers):
            raise ValueError(f"{self._path}: {name} reaches beyond the bytes that are there")
        steps = [step * numbers.itemsize for step in found.stride]
        whole = numbers[found.offset :]
        return np.lib.stride_tricks.as_strided(whole, found.shape, steps).copy()


class Zipped:
    """The layout that torch writes today.

    Attributes:
      found: what its pickle holds.
      little_endian: whether the lowest byte of a number comes first.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        names = self._zip.namelist()
        (pickled,) = (name for name in names if name.endswith("/data.pkl"))
        self._folder = pickled.removesuffix("data.pkl")
        with self._zip.open(pickled) as file:
            self.found = _Unpickler(file).load()
        order = f"{self._folder}byteorder"
        self.little_endian = order not in names or self._zip.read(order) == b"little"
        self.close = self._zip.close

    def read(self, key: str) -> bytes:
        """Returns the bytes of a storage."""
        return self._zip.read(f"{self._folder}data/{key}")


class Pickles:
    """The layout of old: a number, a version, the machine, what is held, the storages' keys.

    After these five pickles come the storages, each as the count of its numbers and their bytes.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            unpickler = [_Unpickler(file) for _ in range(5)]
            if unpickler[0].load() != OLD_NUMBER:
                raise ValueError("it does not begin as torch's files do")
            _, machine, self.found, keys = (each.load() for each in unpickler[1:])
            self.little_endian = bool(machine["little_endian"])
            kinds = dict(unpickler[3].storages)
            self._bytes = {}
            for key in keys:
                count = int.from_bytes(file.read(8), "little")
                size = count * np.dtype(STORAGES[kinds[key]][0]).itemsize
                self._bytes[key] = file.read(size)
                if len(self._bytes[key]) != size:
                    raise ValueError(f"it ends within the tensor {key}: fetch it again")

    def read(self, key: str) -> bytes:
        """Returns the bytes of a storage."""
        return self._bytes[key]

    def close(self) -> None:
        """Forgets the bytes."""
        self._bytes.clear()


def _rebuilt(storage: Any, offset: int, shape: Any, stride: Any, *_: object) -> Tensor:
    return Tensor(storage, int(offset), tuple(shape), tuple(stride))


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class _Unpickler(pickle.Unpickler):
    """One that makes dictionaries of tensors, and calls nothing else.

    Attributes:
      storages: the name and type of each storage that was met.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return KNOWN[module, name]

    def persistent_load(self, saved: Any) -> tuple[str, str]:
        kind, storage, key, _, _, *view = saved
        if kind != "storage" or storage not in STORAGES or any(view):
            raise pickle.UnpicklingError(f"it holds a {kind} of {storage}")
        self.storages.add((str(key), str(storage)))
        return str(key), str(storage)
