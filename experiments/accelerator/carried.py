"""What a machine that reaches no registry has, and how the rest travels there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# What such a machine has: jax for its device, PyTorch, and what these and our core need.
THERE = (
    "absl-py",
    "cloudpickle",
    "einops",
    "etils",
    "flax",
    "jax",
    "jaxlib",
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "numpy",
    "opt-einsum",
    "optax",
    "orbax-checkpoint",
    "packaging",
    "pillow",
    "protobuf",
    "psutil",
    "pyyaml",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
)
# What it lacks, of what is measured there; it is carried with all that these need.
CARRIED = ("array_record", "grain", "ml_collections", "portpicker", "qwix")
PYTHON = "3.12"
# Of glibc's versions pip takes those that are named.
GLIBC = (17, 24, 27, 28, 31, 34)
MOST_BYTES = 60 * 10**6


def pack(folder: Path, say: Callable[[str], None]) -> int:
    """Fills a folder with `CARRIED` for such a machine, checks it and returns the exit code.

    Raises:
      SystemExit: the folder holds something, is too large, or lacks what its packages need.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"--pack={folder}: holds files already: name a new folder")
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", f"--target={folder}", "--no-deps"),
        *("--no-compile", "--only-binary=:all:", f"--python-version={PYTHON}"),
        *("--implementation=cp", "--platform=manylinux2014_x86_64", *platforms, *CARRIED),
    ]
    subprocess.run(command, check=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{folder}: {size:,} bytes, of {MOST_BYTES:,} that may be carried")
    if lacking := missing(folder):
        raise SystemExit(f"{folder}: nobody brings {', '.join(lacking)}")
    say(f"{folder}: {size:,} bytes; it belongs on the PYTHONPATH there")
    return 0


def missing(folder: Path) -> list[str]:
    """Returns what the packages in a folder need and neither it nor the machine has."""
    found = list(metadata.distributions(path=[str(folder)]))
    have = {canonical(each.metadata["Name"]) for each in found} | {canonical(n) for n in THERE}
    environment = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "extra": "",
    }
    needs = [Requirement(line) for each in found for line in each.requires or ()]
    return sorted(
        {
            need.name
            for need in needs
            if need.marker is None or need.marker.evaluate(environment)
            if canonical(need.name) not in have
        }
    )


def canonical(name: str) -> str:
    """Returns the name of a package as all its spellings have in common."""
    return name.lower().replace("_", "-").replace(".", "-")
