"""Sounds: from any file to one channel of int16 samples at `RATE`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16

RATE = 16_000  # samples a second, as all models here hear
SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})


class SoundError(ValueError):
    """The error that a sound cannot be used.

    Attributes:
      what: the fault, without the file's name.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name}: {what}")
        self.what = what


def seconds_of(source: str | Path) -> float:
    """Returns the length of a file, by its header.

    Raises:
      SoundError: it is no sound that can be read.
    """
    with _opened(source, str(source)) as file:
        return float(file.frames / file.samplerate)


def decode(
    source: str | Path | bytes, start: float = 0.0, seconds: float | None = None
) -> Int16[np.ndarray, " S"]:
    """Returns the samples of a file: channels averaged, resampled to `RATE`.

    What is louder than int16 can say, as lossy decoders and resampling make it, has its peak there.

    Args:
      source: a file, or what it holds.
      start: seconds that are left out.
      seconds: the most that are read; None reads to the end.

    Raises:
      SoundError: it cannot be read, is shorter than its header says, holds no sample, or one that
        is not finite.
    """
    name = "the sound" if isinstance(source, bytes) else str(source)
    with _opened(source, name) as file:
        rate, first = file.samplerate, round(start * file.samplerate)
        wanted = max(file.frames - first, 0)
        if seconds is not None:
            wanted = min(wanted, round(seconds * rate))
        try:
            file.seek(min(first, file.frames))
            samples = file.read(wanted, dtype="float32", always_2d=True)
        except RuntimeError as error:
            raise SoundError(name, f"damaged: {error}") from error
    if len(samples) < wanted:
        raise SoundError(name, f"cut short: {len(samples)} of {wanted} samples are there")
    if not len(samples):
        raise SoundError(name, "no samples")
    wave = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
    if not np.isfinite(wave).all():
        raise SoundError(name, "samples that are not finite")
    if rate != RATE:
        wave = _library("soxr").resample(wave, rate, RATE)
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def check(source: str | Path) -> str:
    """Decodes a file completely, and returns what was converted; '' for nothing.

    Raises:
      SoundError: as `decode` does.
    """
    decode(source)
    with _opened(source, str(source)) as file:
        found = [f"resampled from {file.samplerate:,} Hz"] if file.samplerate != RATE else []
        found += [f"{file.channels} channels averaged"] if file.channels > 1 else []
    return ", ".join(found)


def _opened(source: str | Path | bytes, name: str) -> Any:
    soundfile = _library("soundfile")
    try:
        return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except soundfile.LibsndfileError as error:
        raise SoundError(name, f"no sound that can be read: {error.error_string}") from error


def _library(name: str) -> Any:
    """Returns a library of the extra 'audio', which is imported where sounds are met.

    Raises:
      ValueError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"sounds need {name}, of the extra 'audio': pip install 'unified_mm[audio]'"
        ) from error
