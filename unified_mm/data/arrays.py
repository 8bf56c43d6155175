"""NumPy's files, which threads read side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

# Held while a header is parsed: two threads that parse literals at once make CPython 3.11 raise a
# SystemError (python/cpython, 106905).
_HEADERS = threading.Lock()


def read_array(file: Any, check: Callable[[tuple[int, ...], np.dtype], None]) -> np.ndarray:
    """Returns the array of an npy file.

    Args:
      file: opened at its start.
      check: is given the shape and the type before the array is read, and raises what it refuses.

    Raises:
      ValueError: the file is no array of numbers, or is cut short.
    """
    start = np.lib.format
    with _HEADERS:
        version = start.read_magic(file)
        header = start.read_array_header_1_0 if version == (1, 0) else start.read_array_header_2_0
        shape, fortran, dtype = header(file)
    check(shape, dtype)
    if dtype.hasobject:
        raise ValueError("an array of objects")
    found = np.empty(shape, dtype, "F" if fortran else "C")
    read = file.readinto(found.reshape(-1, order="A").view(np.uint8))
    if read < found.nbytes:
        raise ValueError(f"cut short: {read:,} of {found.nbytes:,} bytes are there")
    return found
