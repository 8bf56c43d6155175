"""Files and processes: errors that name the path, atomic writes, locks, and Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

LOCK = ".lock"


class FolderHeld(ValueError):
    """Error for a folder that another process has locked."""


@contextlib.contextmanager
def naming(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError of the system in the body into a ValueError that names a user's path.

    An OSError without an errno already says where it comes from, and passes unchanged.

    Args:
      what: the field or flag with the path, such as data.cache_dir=/x.

    Raises:
      ValueError: if the body raises an OSError with an errno.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise ValueError(f"{what}: {system_says(error)}") from error


def system_says(error: OSError) -> str:
    """Returns the system's error message, with the file that it is about."""
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def user_path(path: str | os.PathLike[str], what: str) -> Path:
    """Returns the path with its `~` expanded.

    Args:
      path: the path.
      what: where the path was given, such as data.dir, for messages.

    Raises:
      ValueError: if the path names the home of a user that does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}: {str(path)!r} names no user of this machine") from error


def user_cache() -> Path:
    """Returns the folder of the user's caches: $UNIFIED_MM_CACHE, else where the system has it.

    Raises:
      ValueError: the user has no home; or a path names a user that there is not.
    """
    if os.environ.get("UNIFIED_MM_CACHE"):
        return user_path(os.environ["UNIFIED_MM_CACHE"], "UNIFIED_MM_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return user_path(base, "XDG_CACHE_HOME") / "unified_mm"
    home = os.path.expanduser("~")
    if home == "~":
        raise ValueError(
            "this user has no home to keep caches in: name a folder that can be written, as "
            "data.cache_dir or in the environment as UNIFIED_MM_CACHE"
        )
    return Path(home) / ".cache" / "unified_mm"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file cannot be read or is no JSON; the message names file, line and column.
    """
    with naming(path):
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {path}") from error
    try:
        return parse_json(content, str(path))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not JSON at {place}: {error.msg}") from error


def parse_json(content: bytes, place: str) -> Any:
    """Returns the value that JSON in UTF-8 holds.

    Args:
      content: the bytes of the JSON.
      place: what error messages begin with.

    Raises:
      json.JSONDecodeError: if the content is not JSON; the caller adds `place` to the message.
      ValueError: if the content is not UTF-8, is nested too deeply, or has a number that is too
        long.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{place}: is UTF-16: save it as UTF-8")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        message = f"{place}: not UTF-8 at byte {error.start}: save it as UTF-8"
        raise ValueError(message) from error
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError(f"{place}: is nested too deeply to be read") from error
    except ValueError as error:  # the interpreter's limit
        raise ValueError(f"{place}: holds a number of too many digits to be read") from error


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, atomically: a reader sees the old file or the whole new one.

    Raises:
      TypeError: if `value` has a type that JSON does not have; the message names the file.
      ValueError: if `value` holds NaN or infinity, or refers to itself; the message names the file.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: cannot be written as JSON: {error}") from error
    if not is_text(text):  # a path that is no UTF-8: JSON's escapes can say it
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces the file at `path` atomically, and creates its folders.

    The content is synced to disk before it takes the name.
    """
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
    """Locks a folder for this process, and creates it where it is missing.

    The lock is a POSIX record lock on the file `.lock` in the folder. It is released however the
    process ends. Forked workers do not hold it, and it does not exclude a second holder within this
    process. Where nothing else came into the folder, the lock goes at the end, and so do the
    folders that were made for it.

    Raises:
      FolderHeld: if another process holds the lock; the message names the process.
      OSError: if the folder cannot be created or written to.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    with _locked(folder):
        try:
            yield
        finally:
            _remove_unused(folder, made)


def _locked(folder: Path) -> TextIO:
    """Returns the lock of a folder, opened and taken; the folder is made where it is missing."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")
        if other := _take(file):
            file.close()
            raise FolderHeld(f"process {other} is at work on {folder}: wait until it ends")
        # Who held it before may have removed what was opened here, and the folder with it.
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _remove_unused(folder: Path, made: list[Path]) -> None:
    """Removes the lock of a folder that holds nothing else, and then those of `made`, from it up.

    The lock is still held: else another process could take it before it is gone.
    """
    if not folder.is_dir() or os.listdir(folder) != [LOCK]:
        return
    (folder / LOCK).unlink()
    for each in made:
        try:
            each.rmdir()
        except OSError:  # something else has come into it
            return


def _take(file: TextIO) -> str:
    """Locks a file that is opened as 'a+', and returns '', or who holds the lock."""
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


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Ignores Ctrl-C, so that processes started in the body do, from their first import on.

    A terminal sends it to them too, and each would show where it was; the one that started them
    ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Makes Python look for no garbage in the body, which makes many objects and drops few.

    To look at them again and again can take as long as to make them; of a start it was a sixth.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


def is_text(name: str) -> bool:
    """Returns whether the string can be encoded as UTF-8.

    A path whose bytes are not UTF-8 cannot.
    """
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
    """Raises ValueError if the path of `--out` exists, or cannot be created."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists and is not overwritten; name a new directory")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"--out={path}: nothing can be written in {above}")


@contextlib.contextmanager
def new_folder(path: Path, what: str = "--out") -> Iterator[Path]:
    """Yields a temporary folder next to `path`, and renames it to `path` when the body succeeds.

    If the body fails, nothing is left. A killed process leaves a folder whose name begins with a
    dot.

    Args:
      path: of the folder.
      what: the flag or field that named it, for messages.

    Raises:
      ValueError: if `path` exists or cannot be created.
    """
    refuse_existing(path)
    with naming(f"{what}={path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        half.chmod(0o755)
        yield half
        os.rename(half, path)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
