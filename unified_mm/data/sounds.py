"""Sounds: from any file to one channel of int16 samples at `RATE`."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int16

from unified_mm.data.records import Source, Stored

RATE = 16_000  # samples a second, as all models here hear
SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"})


class SoundError(ValueError):
    """The error that a sound cannot be used.

    Attributes:
      what: the fault, without the file's name.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)  # both as args, so that it survives pickling
        self.name, self.what = name, what

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def seconds_of(source: Source) -> float:
    """Returns the length of a file, by its header.

    Raises:
      SoundError: it is no sound that can be read.
    """
    with _opened(source) as file:
        return float(file.frames / file.samplerate)


def decode(
    source: Source,
    start: float | Callable[[float], float] = 0.0,
    seconds: float | None = None,
) -> Int16[np.ndarray, " S"]:
    """Returns the samples of a file: channels averaged, resampled to `RATE`.

    What is louder than int16 can say, as lossy decoders and resampling make it, has its peak there.

    Args:
      source: a file, or what it holds.
      start: seconds that are left out, or what says so of the file's length.
      seconds: the most that are read; None reads to the end.

    Raises:
      SoundError: it cannot be read, is shorter than its header says, holds no sample, or one that
        is not finite.
    """
    name = name_of(source)
    with _opened(source) as file:
        rate = file.samplerate
        first = round((start(file.frames / rate) if callable(start) else start) * rate)
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
        wave = library("soxr").resample(wave, rate, RATE)
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def check(source: Source) -> str:
    """Decodes a file completely, and returns what was converted; '' for nothing.

    Raises:
      SoundError: as `decode` does.
    """
    decode(source)
    with _opened(source) as file:
        found = [f"resampled from {file.samplerate:,} Hz"] if file.samplerate != RATE else []
        found += [f"{file.channels} channels averaged"] if file.channels > 1 else []
    return ", ".join(found)


def silence_or_noise(kind: str, samples: int, rng: np.random.Generator) -> Int16[np.ndarray, " S"]:
    """Returns a sound in which nobody speaks, of 'silence' or 'noise'.

    Silence is not quite still. Noise has a power that falls with frequency, any loudness, which may
    swell, and half of the time a hum.
    """
    if kind == "silence":
        return np.rint(rng.normal(size=samples) * rng.uniform(0, 3)).astype(np.int16)
    time = np.arange(samples) / RATE
    spectrum = np.fft.rfft(rng.normal(size=samples))
    steepness, swell = rng.uniform(0, 1), rng.uniform(0, 1)
    wave = np.fft.irfft(spectrum / np.arange(1, len(spectrum) + 1) ** steepness, samples)
    wave /= max(float(wave.std()), 1e-9)
    if rng.random() < 0.5:
        wave += rng.uniform(0, 3) * np.sin(2 * np.pi * rng.uniform(40, 4000) * time)
    phase = rng.uniform(0, 2 * np.pi)
    wave *= 1 + swell * np.sin(2 * np.pi * rng.uniform(0.3, 5) * time + phase)
    loudness = 10 ** rng.uniform(1.5, 4.2)
    return np.clip(np.rint(wave / np.abs(wave).max() * loudness), -32768, 32767).astype(np.int16)


def library(name: str) -> Any:
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


def _opened(source: Source) -> Any:
    soundfile = library("soundfile")
    held = source.read() if isinstance(source, Stored) else source
    try:
        return soundfile.SoundFile(io.BytesIO(held) if isinstance(held, bytes) else held)
    except soundfile.LibsndfileError as error:
        what = f"no sound that can be read: {error.error_string}"
        raise SoundError(name_of(source), what) from error


def name_of(source: Source) -> str:
    """Returns what messages call a sound."""
    return "the sound" if isinstance(source, bytes) else str(source)
