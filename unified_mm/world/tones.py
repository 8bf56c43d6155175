"""A small set of sounds that are made: tones, sweeps, clicks and noises, a folder a class."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

RATE = 16_000
CLASSES = ("clicks", "falling sweep", "high tone", "low tone", "noise", "rising sweep")
SOUNDS = {"train": 60, "val": 20}  # of each class
VERSION = 1  # raise it when the sounds change


def ensure_tones(cache: Path) -> Path:
    """Returns the folder of the sounds, which are written where they are not there yet."""

    def write(file: Path, kind: str, seed: int) -> None:
        write_wave(file.with_suffix(".wav"), sound(kind, seed))

    return ensure_classes(cache / f"tones-{VERSION}", CLASSES, SOUNDS, write)


def ensure_classes(
    folder: Path,
    classes: Sequence[str],
    counts: Mapping[str, int],
    write: Callable[[Path, str, int], None],
) -> Path:
    """Returns a folder that has a folder a class in each split, made where it is not there yet.

    Args:
      folder: where it is.
      classes: their names.
      counts: the files of each class, by the split.
      write: writes the file of a path without suffix, a class and a seed.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    for split, count in counts.items():
        for kind in classes:
            (made / split / kind).mkdir(parents=True)
            for number in range(count):
                name = f"{split} {kind} {number}"
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
                write(made / split / kind / str(number), kind, seed)
    try:
        made.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(made)
    return folder


def sound(kind: str, seed: int) -> Float[np.ndarray, " S"]:
    """Returns half a second to a second of a class, in -1..1, with some noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(rng.uniform(0.5, 1.0) * RATE)) / RATE
    low, high = rng.uniform(150, 400), rng.uniform(1500, 3500)
    if kind == "noise":
        made = rng.normal(size=len(time)) * 0.3
    elif kind == "clicks":
        made = np.where(np.arange(len(time)) % int(rng.uniform(800, 2400)) < 30, 1.0, 0.0)
    elif kind.endswith("sweep"):
        first, last = (low, high) if kind.startswith("rising") else (high, low)
        made = np.sin(2 * np.pi * (first * time + (last - first) * time**2 / (2 * time[-1])))
    else:
        made = np.sin(2 * np.pi * (high if kind.startswith("high") else low) * time)
    made = made * rng.uniform(0.1, 0.8) + rng.normal(size=len(time)) * 0.01
    return np.clip(made, -1.0, 1.0)


def write_wave(path: Path, sound: Float[np.ndarray, " S"]) -> None:
    """Writes a sound in -1..1 as 16-bit samples of one channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(sound * 32767).astype("<i2").tobytes())
