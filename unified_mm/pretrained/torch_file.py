"""Tensors of a file that torch.save wrote, read without torch and without running any code in it.

Such a file is a zip of the tensors' bytes and of a pickle that says how they are put together. Only
what a dictionary of tensors needs is allowed in the pickle.
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
            self._zip = zipfile.ZipFile(path)
            (pickled,) = (name for name in self._zip.namelist() if name.endswith("/data.pkl"))
            self._folder = pickled.removesuffix("data.pkl")
            with self._zip.open(pickled) as file:
                found = _Unpickler(file).load()
            order = f"{self._folder}byteorder"
            little = order not in self._zip.namelist() or self._zip.read(order) == b"little"
            if not isinstance(found, dict):
                raise ValueError(f"it is a {type(found).__name__}")
        except DAMAGES as error:
            raise ValueError(f"{path} holds no tensors that can be read safely: {error}") from error
        if not little or not all(isinstance(each, Tensor) for each in found.values()):
            raise ValueError(f"{path} holds other things than tensors by name, little-endian")
        self._tensors: dict[str, Tensor] = dict(found)

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

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
        numbers = np.frombuffer(
            self._zip.read(f"{self._folder}data/{key}"), np.dtype(STORAGES[kind][0])
        )
        if min((found.offset, *found.shape, *found.stride), default=0) < 0:
            raise ValueError(f"{self._path}: {name} begins before the bytes that are there")
        last = sum((n - 1) * s for n, s in zip(found.shape, found.stride, strict=True))
        if 0 not in found.shape and found.offset + last >= len(numbers):
            raise ValueError(f"{self._path}: {name} reaches beyond the bytes that are there")
        steps = [step * numbers.itemsize for step in found.stride]
        whole = numbers[found.offset :]
        return np.lib.stride_tricks.as_strided(whole, found.shape, steps).copy()


def _rebuilt(storage: Any, offset: int, shape: Any, stride: Any, *_: object) -> Tensor:
    return Tensor(storage, int(offset), tuple(shape), tuple(stride))


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class _Unpickler(pickle.Unpickler):
    """One that makes dictionaries of tensors, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return KNOWN[module, name]

    def persistent_load(self, saved: Any) -> tuple[str, str]:
        kind, storage, key, *_ = saved
        if kind != "storage" or storage not in STORAGES:
            raise pickle.UnpicklingError(f"it holds a {kind} of {storage}")
        return str(key), str(storage)
