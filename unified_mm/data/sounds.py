"""Sounds: from any file to one channel of int16 samples at `RATE`."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int16

from unified_mm.data.records import Source, Stored

RATE = 16_000  # samples a second, as all models here hear
MOST_SECONDS = 10_000_000  # that a header may tell of: four months
BLOCK = 65_536  # samples that are checked at a time
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
        except (RuntimeError, MemoryError) as error:
            raise SoundError(name, f"damaged: {error}") from error
    _check_count(name, len(samples), wanted)
    _check_finite(name, samples)
    wave = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
    if rate != RATE:
        wave = library("soxr").resample(wave, rate, RATE)
    if not len(wave):
        raise SoundError(name, f"not one sample at {RATE:,} Hz")
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def check(source: Source) -> str:
    """Decodes a file completely, a block at a time, and returns what is converted; '' for nothing.

    Raises:
      SoundError: as `decode` does.
    """
    name, read = name_of(source), 0
    with _opened(source) as file:
        try:
            for block in file.blocks(BLOCK, dtype="float32", always_2d=True):
                _check_finite(name, block)
                read += len(block)
        except RuntimeError as error:
            raise SoundError(name, f"damaged: {error}") from error
        _check_count(name, read, file.frames)
        if read * RATE < file.samplerate:
            raise SoundError(name, f"not one sample at {RATE:,} Hz")
        found = [f"resampled from {file.samplerate:,} Hz"] if file.samplerate != RATE else []
        found += [f"{file.channels} channels averaged"] if file.channels > 1 else []
    return ", ".join(found)


def _check_count(name: str, read: int, wanted: int) -> None:
    if read < wanted:
        raise SoundError(name, f"cut short: {read} of {wanted} samples are there")
    if not read:
        raise SoundError(name, "no samples")


def _check_finite(name: str, samples: np.ndarray) -> None:
    if not np.isfinite(samples).all():
        raise SoundError(name, "samples that are not finite")


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
        file = soundfile.SoundFile(io.BytesIO(held) if isinstance(held, bytes) else held)
    except soundfile.LibsndfileError as error:
        what = f"no sound that can be read: {error.error_string}"
        raise SoundError(name_of(source), what) from error
    # Encoders that write to a pipe leave out how long the sound is, which reads as ever so long.
    if file.frames > MOST_SECONDS * file.samplerate:
        file.close()
        what = f"its header tells of no length, or of over {MOST_SECONDS:,} s: encode it again"
        raise SoundError(name_of(source), what)
    return file


def name_of(source: Source) -> str:
    """Returns what messages call a sound."""
    return "the sound" if isinstance(source, bytes) else str(source)
