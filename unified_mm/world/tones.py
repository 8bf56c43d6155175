"""Small sets of sounds that are made: tones, sweeps, clicks and noises, a folder a class.

And strings of digits, each the two tones that a telephone has for it, with what they say.
"""

from __future__ import annotations

import csv
import wave
from pathlib import Path

import numpy as np
from jaxtyping import Float

from unified_mm.world.made import ensure_classes, ensure_folder, seed_of

RATE = 16_000
CLASSES = ("clicks", "falling sweep", "high tone", "low tone", "noise", "rising sweep")
SOUNDS = {"train": 60, "val": 20}  # of each class
VERSION = 1  # raise it when the sounds change
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)  # Hz of a telephone's keys
STRINGS = {"train": 600, "val": 100}
LONGEST = 4  # digits of a string


def ensure_tones(cache: Path) -> Path:
    """Returns the folder of the sounds, which are written where they are not there yet."""

    def write(file: Path, kind: str, seed: int) -> None:
        write_wave(file.with_suffix(".wav"), sound(kind, seed))

    return ensure_classes(cache / f"tones-{VERSION}", CLASSES, SOUNDS, write)


def ensure_strings(cache: Path) -> Path:
    """Returns the folder of the strings of digits, with a `metadata.csv` a split, likewise."""
    return ensure_folder(cache / f"strings-{VERSION}", _write_strings)


def _write_strings(made: Path) -> None:
    for split, count in STRINGS.items():
        (made / split).mkdir()
        rows = [("file_name", "text")]
        for number in range(count):
            wave, text = digit_string(seed_of(f"{split} string {number}"))
            write_wave(made / split / f"{number}.wav", wave)
            rows.append((f"{number}.wav", text))
        with (made / split / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def digit_string(seed: int) -> tuple[Float[np.ndarray, " S"], str]:
    """Returns one to `LONGEST` digits as tones, in -1..1, and in words."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(10, size=rng.integers(1, LONGEST + 1))
    parts = [np.zeros(int(rng.uniform(0.0, 0.1) * RATE))]
    for digit in digits.tolist():
        row, column = divmod(digit - 1, 3) if digit else (3, 1)
        time = np.arange(int(rng.uniform(0.1, 0.2) * RATE)) / RATE
        tones = np.sin(2 * np.pi * ROWS[row] * time) + np.sin(2 * np.pi * COLUMNS[column] * time)
        parts += [tones * rng.uniform(0.2, 0.4), np.zeros(int(rng.uniform(0.05, 0.1) * RATE))]
    made = np.concatenate(parts)
    made += rng.normal(size=len(made)) * 10 ** rng.uniform(-3, -1.5)
    return np.clip(made, -1.0, 1.0), " ".join(DIGITS[digit] for digit in digits)


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
