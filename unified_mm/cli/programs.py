"""What a command compiles is kept for the next one, in the user's cache.

Compiling is most of what a command waits for before its first step or answer. jax keeps programs by
what they compute, its version and the machine; who names another place, by
`JAX_COMPILATION_CACHE_DIR` ('' for none), is left alone. Processes on CPUs that share a run take
none from it, see `parallel.processes.start`.

What a command finds is bounded here, before it begins. jax's own bound looks at every program to
keep one more, and where a process was killed as it wrote one, no later process keeps any.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import stat
import sys
from pathlib import Path

import jax

from unified_mm.files import system_says, user_cache

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Beyond either, the programs that were not used for longest are forgotten.
MOST = 2_000
MOST_BYTES = 2**30
ZSTD = b"\x28\xb5\x2f\xfd"  # begins what zstandard, where it is installed, compresses for jax


def keep_programs() -> None:
    """Has jax keep its programs, where nobody decided otherwise; says why where it cannot."""
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return None
    try:
        folder = user_cache() / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
    except ValueError as error:
        return _say(str(error))
    except OSError as error:
        return _say(system_says(error))
    if not os.access(folder, os.W_OK | os.X_OK):
        return _say(f"{folder} cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", -1)
    # Most programs are small, and there are many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def tidy(folder: Path) -> None:
    """Removes the programs beyond the bounds, and those that a process was killed in writing.

    What another process is writing now may be among these: it is compiled once more.
    """
    for file in (*folder.glob("*-atime"), folder / ".lockfile"):  # of jax's own bound
        _remove(file)
    found = []
    for file in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            found.append((file.stat(), file))
    # Many file systems note no more of a use than its day, and some nothing.
    found.sort(key=lambda each: max(each[0].st_atime, each[0].st_mtime), reverse=True)
    room = MOST_BYTES
    for number, (about, file) in enumerate(found):
        room -= about.st_size
        if number >= MOST or room < 0 or not _whole(file, about):
            _remove(file)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone, or another user's
        file.unlink()


def _whole(file: Path, about: os.stat_result) -> bool:
    """Returns whether a program can be read; one that can is read-only, and not read again."""
    if not about.st_mode & stat.S_IWUSR:
        return True
    from jax._src.compilation_cache import decompress_executable

    try:
        content = file.read_bytes()
    except OSError:
        return True  # another user's
    if content.startswith(ZSTD) and importlib.util.find_spec("zstandard") is None:
        return True  # an environment's that compresses otherwise
    try:
        decompress_executable(content)
    except Exception:  # the error of whichever library jax compresses with
        return False
    with contextlib.suppress(OSError):  # another user's
        file.chmod(0o444)
    return True


def _say(why: str) -> None:
    print(f"compiled programs are not kept: {why}", file=sys.stderr)
