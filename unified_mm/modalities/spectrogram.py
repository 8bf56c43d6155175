"""Log-mel spectrograms on the device: two products with a square between.

The window, and what comes before it (the mean taken off, the pre-emphasis), is linear, so that it
is part of the matrix of the Fourier transform. One CPU, whose products are dear, takes the fast
transform instead of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision, platform_dependent
from jaxtyping import Array, Bool, Float, Int

from unified_mm.data.sounds import RATE

WINDOW, HOP = 400, 160  # samples: 25 and 10 ms


@dataclass(frozen=True)
class Preset:
    """One of the ways in which published models take spectrograms.

    Attributes:
      fft: samples of the Fourier transform.
      centred: whether frame t lies around sample t * HOP, the ends mirrored, and the last frame is
        left out; else it begins there.
      periodic: whether the Hann window is.
      mean_off: whether each frame's mean is taken off.
      emphasis: share of the sample before that is taken off each.
      scale: of mel: 'slaney' (linear below 1 kHz, areas normalised) or 'kaldi'.
      low: Hz, where the lowest filter begins.
      least: below which the power of a filter does not fall.
    """

    fft: int
    centred: bool
    periodic: bool
    mean_off: bool
    emphasis: float
    scale: str
    low: float
    least: float

    def frames(self, samples: int) -> int:
        """Returns how many frames a sound of so many samples has."""
        return samples // HOP if self.centred else max(1, 1 + (samples - WINDOW) // HOP)

    def frames_of(self, lengths: Int[Array, " B"]) -> Int[Array, " B"]:
        """Returns how many frames hold sound, of sounds that are padded with zeros."""
        if self.centred:
            return -(-lengths // HOP)
        return jnp.where(lengths > 0, jnp.maximum(1, 1 + (lengths - WINDOW) // HOP), 0)

    @property
    def first_centre(self) -> float:
        """Seconds at which the middle of the first frame lies."""
        return 0.0 if self.centred else WINDOW / 2 / RATE

    @cached_property
    def transform(self) -> Float[np.ndarray, "window twice"]:
        """The matrix of a frame's real and imaginary parts, one after the other."""
        spectrum = np.fft.rfft(self.windowed(np.eye(WINDOW), np), self.fft, axis=1)
        return np.concatenate([spectrum.real, spectrum.imag], axis=1).astype(np.float32)

    def windowed(self, x: Any, on: Any) -> Any:
        """Returns frames [..., window] as they are transformed, computed by numpy or jax.numpy."""
        if self.mean_off:
            x = x - x.mean(-1, keepdims=True)
        if self.emphasis:
            x = x - self.emphasis * on.concatenate([x[..., :1], x[..., :-1]], axis=-1)
        window = np.hanning(WINDOW + 1)[:-1] if self.periodic else np.hanning(WINDOW)
        return x * window.astype(x.dtype)

    def multiplied(self, frames: Float[Array, "B N window"]) -> Float[Array, "B N bins"]:
        """Returns the power of each frequency, by one product."""
        spectrum = jnp.matmul(frames, self.transform, precision=Precision.HIGHEST)
        real, imaginary = jnp.split(spectrum, 2, axis=-1)
        return jnp.square(real) + jnp.square(imaginary)

    def transformed(self, frames: Float[Array, "B N window"]) -> Float[Array, "B N bins"]:
        """Returns the same by the fast Fourier transform."""
        spectrum = jnp.fft.rfft(self.windowed(frames, jnp), self.fft)
        return jnp.square(spectrum.real) + jnp.square(spectrum.imag)

    def filters(self, mels: int) -> Float[np.ndarray, "bins mels"]:
        """Returns the triangular filters of the mel bands."""
        to_mel, to_hertz = SCALES[self.scale]
        edges = np.linspace(to_mel(self.low), to_mel(RATE / 2), mels + 2)
        hertz = np.linspace(0, RATE / 2, self.fft // 2 + 1)
        if self.scale == "kaldi":  # triangles in mel
            points = to_mel(np.arange(self.fft // 2 + 1) * (RATE / self.fft))
        else:
            points, edges = hertz, to_hertz(edges)
        rising = (points[:, None] - edges[:-2]) / np.diff(edges)[:-1]
        falling = (edges[2:] - points[:, None]) / np.diff(edges)[1:]
        found = np.maximum(0.0, np.minimum(rising, falling))
        if self.scale == "slaney":
            found = found * (2.0 / (edges[2:] - edges[:-2]))
        return found.astype(np.float32)


def _slaney(hertz: Any) -> Any:
    return np.where(
        np.asarray(hertz) < 1000.0,
        np.asarray(hertz) * 3.0 / 200.0,
        15.0 + np.log(np.maximum(hertz, 1e-10) / 1000.0) * (27.0 / np.log(6.4)),
    )


def _slaney_hertz(mel: Any) -> Any:
    return np.where(mel < 15.0, 200.0 * mel / 3.0, 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15)))


def _kaldi(hertz: Any) -> Any:
    return 1127.0 * np.log(1.0 + np.asarray(hertz) / 700.0)


SCALES: dict[str, tuple[Any, Any]] = {"slaney": (_slaney, _slaney_hertz), "kaldi": (_kaldi, None)}
PRESETS = {
    # Radford et al. 2022 (Whisper), section 2.2.
    "whisper": Preset(400, True, True, False, 0.0, "slaney", 0.0, 1e-10),
    # Gong et al. 2021 (AST), section 2.1; ImageBind and AudioMAE hear so too.
    "kaldi": Preset(512, False, False, True, 0.97, "kaldi", 20.0, 1.192092955078125e-07),
}


def mel_power(preset: Preset, wave: Float[Array, "B S"], mels: int) -> Float[Array, "B N mels"]:
    """Returns the power of each mel band in each frame.

    Args:
      preset: the kind of spectrogram.
      wave: samples in -1..1.
      mels: bands.
    """
    count = preset.frames(wave.shape[1])
    if preset.centred:
        wave = jnp.pad(wave, ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    elif wave.shape[1] < WINDOW:
        wave = jnp.pad(wave, ((0, 0), (0, WINDOW - wave.shape[1])))
    frames = wave[:, np.arange(count)[:, None] * HOP + np.arange(WINDOW)]
    # XLA does not divide a fast transform among devices: each would gather all frames.
    alone = jax.sharding.get_abstract_mesh().size <= 1  # 0 where none is set
    on_cpu = preset.transformed if alone else preset.multiplied
    power = platform_dependent(frames, cpu=on_cpu, default=preset.multiplied)
    return jnp.matmul(power, preset.filters(mels), precision=Precision.HIGHEST)


def log_mel(
    name: str, wave: Float[Array, "B S"], mels: int, there: Bool[Array, "B N"]
) -> Float[Array, "B N mels"]:
    """Returns the logarithm of `mel_power` as the models of a preset take it, before their mean.

    Args:
      name: of `PRESETS`.
      wave: samples in -1..1.
      mels: bands.
      there: which frames hold sound.
    """
    preset = PRESETS[name]
    power = jnp.maximum(mel_power(preset, wave, mels), preset.least)
    if name == "kaldi":
        return jnp.log(power)
    found = jnp.log10(power)
    loudest = jnp.where(there[..., None], found, -10.0).max((1, 2), keepdims=True)
    return (jnp.maximum(found, loudest - 8.0) + 4.0) / 4.0
