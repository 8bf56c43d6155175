"""The environment of a run: devices, versions, revision; and an accelerator that jax misses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import jax

Found = TypeVar("Found")
_GIT_SECONDS = 10


def or_warn(what: str, work: Callable[[], Found]) -> Found | None:
    """Returns what `work` returns; where it fails, warns of what is missing, and returns None.

    For what is only nice to know: no run ends for it.
    """
    try:
        return work()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"the run goes on without {what} ({reason})", stacklevel=2)
        return None


def device_name() -> str:
    """Returns how many devices there are, and of which kind."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"cpu ({platform.machine()}, {cpu_count()} cores)"
    return f"{len(devices)} x {kind}"


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unseen_accelerator() -> str | None:
    """Returns a warning where the machine has an accelerator that jax does not see, else None."""
    if jax.default_backend() != "cpu":
        return None
    if Path("/proc/driver/nvidia/version").exists():
        return (
            "this machine has an NVIDIA GPU that jax does not see: pip install 'unified_mm[cuda12]'"
        )
    if any(Path("/dev").glob("accel*")):
        return "this machine has a TPU that jax does not see: pip install 'unified_mm[tpu]'"
    return None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers.

    It is '' for a package of which nothing is known, with a warning.
    """
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    found = {
        name: or_warn(f"the version of {name}", partial(metadata.version, name)) or ""
        for name in names
    }
    return {"python": platform.python_version(), **found}


def revision() -> str:
    """Returns the git commit of this checkout, with `+` where it was changed; '' outside one.

    It is '' with a warning where git does not answer within 10 seconds, or cannot be run.
    """
    if shutil.which("git") is None:
        return ""
    return or_warn("the git revision", _described) or ""


def _described() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--match="],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=_GIT_SECONDS,
        check=False,
    )
    return run.stdout.strip()
