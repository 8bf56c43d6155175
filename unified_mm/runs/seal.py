"""A seal: one file with the SHA-256 of every file of a folder, in the format of `sha256sum`.

It notices what the values alone cannot: a byte changed in a file that happens not to matter now.
`cd <folder> && sha256sum --check SHA256SUMS` verifies it without this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

from unified_mm.files import sha256, write_atomically

SEAL = "SHA256SUMS"


def write_seal(folder: Path) -> None:
    """Seals the folder as it is. The write is atomic; every byte is read once."""
    write_atomically(folder / SEAL, _seal_text(folder).encode())


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).exists()


def broken_files(folder: Path) -> tuple[str, ...]:
    """Returns the names, within the folder, of the files that are not as sealed; () for none.

    A file that changed, that is missing or that was added is named, and the seal itself where it
    is the damaged one. Reads every byte once.
    """
    sealed = (folder / SEAL).read_bytes()
    found = _seal_text(folder).encode()
    if sealed == found:
        return ()
    changed = set(sealed.splitlines()) ^ set(found.splitlines())
    names = {line.partition(b"  ")[2].decode(errors="replace") for line in changed}
    return tuple(sorted(names)) or (SEAL,)


def _seal_text(folder: Path) -> str:
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in _file_names(folder))


def _file_names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != SEAL and not name.startswith(f".{SEAL}."))


# Odd constants without meaning; they only keep the two sums of a leaf independent.
_SEEDS = (0x9E3779B9, 0x7F4A7C15)
SMALL = 2**20  # elements: the host has summed them before a program for it is compiled
_PART = 2**16  # words that are summed at a time on the host: a core's cache holds them


def tree_checksums(tree: PyTree[Any]) -> PyTree[UInt32[np.ndarray, " 2"]]:
    """Returns a checksum for each leaf: of its bits and their positions, not of its name.

    Leaves may be of any shape (also [] and [0]) and of float, complex, integer, bool or PRNG key
    dtype. Two leaves of different dtype or shape may share a checksum: compare those as well.
    Within a leaf, positions repeat after 2**32 words. A program is compiled for each shape, dtype
    and sharding, but not for a small leaf that lies on one CPU device.
    """
    # One at a time: many programs that each reduce over all devices, queued at once, wait for each
    # other's threads for ever where the devices are a CPU's.
    return jax.tree.map(_leaf_checksum, tree)


def _leaf_checksum(leaf: Shaped[Array, " ..."]) -> UInt32[np.ndarray, " 2"]:
    devices: set[Any] = leaf.sharding.device_set
    if len(devices) > 1 or next(iter(devices)).platform != "cpu" or leaf.size > SMALL:
        return jax.device_get(array_checksum(leaf))
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return host_checksum(np.asarray(jax.random.key_data(leaf) if is_key else leaf))


@jax.jit
def array_checksum(array: Shaped[Array, " ..."]) -> UInt32[Array, " 2"]:
    """Returns the checksum of one array, as `tree_checksums` describes it."""
    words = _words(array)
    position = _positions(words.shape)
    return jnp.stack(
        [
            jnp.sum(_mix(words ^ _mix(position + jnp.uint32(seed))), dtype=jnp.uint32)
            for seed in _SEEDS
        ]
    )


def host_checksum(array: Shaped[np.ndarray, " ..."]) -> UInt32[np.ndarray, " 2"]:
    """Returns `array_checksum` of an array in the host's memory, computed there, part by part."""
    words = _host_words(array)
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(words), _PART):
        part = words[start : start + _PART].astype(np.uint32)
        position = np.arange(len(part), dtype=np.uint32) + np.uint32(start % 2**32)
        mixed = [_mix(part ^ _mix(position + np.uint32(seed))) for seed in _SEEDS]
        sums += np.array([np.sum(each, dtype=np.uint32) for each in mixed])
    return sums


def _host_words(array: Shaped[np.ndarray, " ..."]) -> Shaped[np.ndarray, " _"]:
    """Returns an array's bits as words of at most 32 bits, in row-major order."""
    if array.dtype == bool:
        return array.reshape(-1)
    if array.dtype.kind != "c" and _bits(array.dtype) < 8:
        array = array.astype(np.float32 if _is_float(array.dtype) else np.int32)
    kind = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    return np.ascontiguousarray(array).reshape(-1).view(kind)


def _words(array: Shaped[Array, " ..."]) -> UInt32[Array, " ..."]:
    """Returns an array's bits as words; each element owns its words, so that sharding is kept."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = _bits(array.dtype)
    if bits < 8:
        array, bits = array.astype(jnp.float32 if _is_float(array.dtype) else jnp.int32), 32
    if bits == 64:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> UInt32[Array, " ..."]:
    """Returns the row-major position of every word, modulo 2**32.

    It reshapes nothing that is sharded.
    """
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return position


def _mix(word: Any) -> Any:
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _bits(dtype: Any) -> int:
    return int(jnp.finfo(dtype).bits if _is_float(dtype) else jnp.iinfo(dtype).bits)
