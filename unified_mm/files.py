"""Files and folders: errors that name them, writes that are whole, one holder at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"


class FolderHeld(ValueError):
    """Another process holds a folder."""


@contextlib.contextmanager
def naming(what: str | os.PathLike[str]) -> Iterator[None]:
    """For work on a path that a user gave: what the system says of it becomes a ValueError.

    `what` names field and path, such as data.cache_dir=/x. An error that says where it comes from
    already (it has no number of the system's) passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise ValueError(f"{what}: {system_says(error)}") from error


def system_says(error: OSError) -> str:
    """The system's words and the file that they are about."""
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def user_path(path: str | os.PathLike[str], what: str) -> Path:
    """The path with its `~` resolved; `what` names where it was given, such as data.dir.

    Raises ValueError for the home of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}: {str(path)!r} names no user of this machine") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises FileNotFoundError, and ValueError that names file, line and column of what is wrong.
    """
    with naming(path):
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {path}") from error
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8: {error.reason}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, atomically: a reader sees the old file or the new one, whole.

    Raises ValueError or TypeError, with the file's name, where JSON cannot hold the value
    (NaN and infinity among them).
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: cannot be written as JSON: {error}") from error
    if not is_text(text):  # a path that is no UTF-8: JSON's escapes can say it
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces the file at `path`, creating folders; on disk before it takes the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder, made where it is missing, for this process; it is free however that ends.

    A POSIX record lock on its file `.lock`: workers that are forked do not keep it, and it does not
    tell two holders within one process apart.

    Raises:
      FolderHeld: another process has it, which is named.
      OSError: the folder cannot be made or written in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        if other := _take(file):
            raise FolderHeld(f"process {other} is at work on {folder}: wait until it ends")
        yield


def _take(file: TextIO) -> str:
    """Takes the lock of a file, opened as 'a+': '', else who has it."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        return file.read().strip() or "?"
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return ""


def is_text(name: str) -> bool:
    """Whether UTF-8 can say it: no part of a path that is made of other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
