"""Small sets of data that this package makes once and keeps in the cache."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def ensure_classes(
    folder: Path,
    classes: Sequence[str],
    counts: Mapping[str, int],
    write: Callable[[Path, str, int], None],
) -> Path:
    """Returns a folder that has a folder a class in each split, made where it is not there yet.

    Args:
      folder: where it is.
      classes: their names.
      counts: the files of each class, by the split.
      write: writes the file of a path without suffix, a class and a seed.
    """

    def write_all(made: Path) -> None:
        for split, count in counts.items():
            for kind in classes:
                (made / split / kind).mkdir(parents=True)
                for number in range(count):
                    seed = seed_of(f"{split} {kind} {number}")
                    write(made / split / kind / str(number), kind, seed)

    return ensure_folder(folder, write_all)


def ensure_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Returns a folder that `write` fills where it is not there yet, whole or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        write(made)
        made.rename(folder)
    except BaseException as error:
        shutil.rmtree(made)
        if not (isinstance(error, OSError) and folder.is_dir()):  # another process was first
            raise
    return folder


def seed_of(name: str) -> int:
    """Returns the seed that a name stands for."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
