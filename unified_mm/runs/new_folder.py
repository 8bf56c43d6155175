"""Folders that a command makes anew: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unified_mm.files import naming


def refuse_existing(path: Path) -> None:
    """Raises ValueError where there is something, or where nothing can be made."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists and is not overwritten; name a new directory")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"--out={path}: nothing can be written in {above}")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`, which takes that name when the work on it is done.

    Where anything goes wrong, nothing is left; a killed process leaves a folder whose name begins
    with a dot.

    Raises:
      ValueError: `path`, which `--out` named, exists or cannot be made.
    """
    refuse_existing(path)
    with naming(f"--out={path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        half.chmod(0o755)
        yield half
        os.rename(half, path)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
