"""Files of a network folder, copied once into the cache and read there.

Every URL that `etils.epath` reads works: `gs://` (pip install gcsfs), `s3://` (s3fs), ...
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_mm.files import naming


def is_remote(place: str) -> bool:
    """Returns whether a place is a URL rather than a path of this machine."""
    return "://" in place


@dataclass(frozen=True)
class Mirror:
    """A network folder and its copy; errors of its methods are ValueErrors that name the folder."""

    url: str
    cache: Path

    @property
    def folder(self) -> Path:
        """The folder of the copies."""
        name = hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()[:16]
        return self.cache / "mirrors" / name

    def names(self, below: str = "") -> list[str]:
        """Returns the files in the folder, or in its subfolder `below` (which ends in a slash).

        There are none where there is no such folder.
        """
        with self._told():
            place = self._place(below)
            if not place.is_dir():
                return []
            return sorted(f"{below}{each.name}" for each in place.iterdir() if not each.is_dir())

    def fetch(self, names: Collection[str]) -> None:
        """Copies files that are missing, or whose size or time of change differs."""
        from tqdm import tqdm

        with self._told():
            stale = [name for name in names if not self._is_fresh(name)]
            for name in tqdm(stale, f"copying {self.url}", unit="file", disable=None):
                self._copy(name)

    def _is_fresh(self, name: str) -> bool:
        copy, there = self.folder / name, self._place(name).stat()
        if not copy.is_file():
            return False
        here = copy.stat()
        return (here.st_size, int(here.st_mtime)) == (there.length, int(there.mtime or 0))

    def _copy(self, name: str) -> None:
        target = self.folder / name
        with naming(f"the copy of {self.url} in {self.folder}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        time = int(self._place(name).stat().mtime or 0)
        try:
            with os.fdopen(handle, "wb") as file, self._place(name).open("rb") as there:
                shutil.copyfileobj(there, file, 1 << 22)
                file.flush()
                os.fsync(file.fileno())
            os.utime(temporary, (time, time))
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _place(self, name: str) -> Any:
        from etils import epath

        return epath.Path(self.url) / name

    @contextmanager
    def _told(self) -> Iterator[None]:
        # Clients of stores raise errors of their own kinds.
        try:
            yield
        except Exception as error:
            said = str(error) or type(error).__name__
            raise ValueError(f"data.dir={self.url} cannot be read: {said}") from error
