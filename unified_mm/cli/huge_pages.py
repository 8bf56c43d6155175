"""Huge pages for the memory of a training step on a CPU.

Every step allocates its temporaries anew, and a fifth of its time went into faults of 4 KB pages;
with transparent huge pages a fault brings 2 MB. glibc asks for them where a variable says so before
the process begins, so a command starts itself again with it: the same process number, arguments,
signals and exit code. It imports no jax, so that little is done twice.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "UNIFIED_MM_HUGE_PAGES"  # 0: the command does not start itself again
TUNABLES = "GLIBC_TUNABLES"
ASKED = "glibc.malloc.hugetlb=1"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/proc/driver/nvidia/version", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")
# With several processes of a run, who started them decides about their memory.
SEVERAL = ("--coordinator", "--process", "--distributed")
DEBUGGERS = ("pdb", "pydevd", "debugpy")


def start_again(module: str) -> None:
    """Starts the command `python -m MODULE` again with huge pages, where nobody decided otherwise.

    It returns where they do not help, or where this process is something else (a notebook, tests,
    a debugger): then all stays as it is.
    """
    decision = os.environ.get(VARIABLE, "1")
    if decision not in ("0", "1"):
        sys.exit(f"error: {VARIABLE}={decision}: must be 0 or 1")
    decided = decision == "0" or TUNABLES in os.environ
    if decided or not is_command(module) or not help_here():
        return
    print(
        f"starts again with huge pages, {TUNABLES}={ASKED} ({VARIABLE}=0: without)",
        file=sys.stderr,
        flush=True,
    )
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {TUNABLES: ASKED})


def is_command(module: str) -> bool:
    """Returns whether this process is `python -m MODULE`, alone and at work."""
    words = sys.orig_argv
    place = words.index("-m") + 1 if "-m" in words else len(words)
    watched = sys.gettrace() is not None or any(name in sys.modules for name in DEBUGGERS)
    asked = words[place + 1 :]
    other = any(word in ("-h", "--help") or word.startswith(SEVERAL) for word in asked)
    return words[place : place + 1] == [module] and not watched and not other


def help_here() -> bool:
    """Returns whether huge pages are to be had, and jax's arrays are in this machine's memory."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    _, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    known = [int(part) for part in version.split(".")[:2]]
    try:
        asked_for = "[madvise]" in PAGES.read_text()  # where they come unasked, glibc asks for none
    except OSError:
        return False
    if known < [2, 35] or not asked_for:
        return False
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return on_cpu or not any(Path(each).exists() for each in ACCELERATORS)
