"""What a command compiles is kept for the next one, in the user's cache.

Compiling is most of what a command waits for before its first step or answer. jax keeps programs by
what they compute, its version and the machine; who names another place, by
`JAX_COMPILATION_CACHE_DIR` ('' for none), is left alone. Processes on CPUs that share a run take
none from it, see `parallel.processes.start`.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import jax

from unified_mm.files import system_says, user_cache

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MOST_BYTES = 2**30  # beyond, those that were not used for longest are forgotten


def keep_programs() -> None:
    """Has jax keep its programs, where nobody decided otherwise; says why where it cannot."""
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return None
    if importlib.util.find_spec("filelock") is None:  # jax bounds the size with its help
        return _say("there is no package filelock")
    try:
        folder = user_cache() / "programs"
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        return _say(str(error))
    except OSError as error:
        return _say(system_says(error))
    if not os.access(folder, os.W_OK | os.X_OK):
        return _say(f"{folder} cannot be written to")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # Most programs are small, and there are many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def _say(why: str) -> None:
    print(f"compiled programs are not kept: {why}", file=sys.stderr)
