"""The environment of a run: devices, versions, revision; and an accelerator that jax misses."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax


def device_name() -> str:
    """Returns how many devices there are, and of which kind."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"cpu ({platform.processor() or platform.machine()}, {cpu_count()} cores)"
    return f"{len(devices)} x {kind}"


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unseen_accelerator() -> str | None:
    """Returns a warning where the machine has an accelerator that jax does not see, else None."""
    if jax.default_backend() != "cpu":
        return None
    if Path("/proc/driver/nvidia/version").exists():
        return "this machine has an NVIDIA GPU that jax does not see: pip install -e '.[cuda12]'"
    if any(Path("/dev").glob("accel*")):
        return "this machine has a TPU that jax does not see: pip install -e '.[tpu]'"
    return None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def revision() -> str:
    """Returns the git commit of this checkout, with `+` where it was changed; '' outside one."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--match="],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()
