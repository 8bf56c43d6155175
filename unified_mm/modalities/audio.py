"""Audio: parts of a log-mel spectrogram become tokens.

They are patches (Gong et al. 2021, AST, section 2.1), or moments (Radford et al. 2022, Whisper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from unified_mm.config import build_options, option
from unified_mm.data import sounds
from unified_mm.data.records import File, Record
from unified_mm.modalities.image import START
from unified_mm.modalities.spectrogram import HOP, PRESETS, log_mel
from unified_mm.nn.feed_forward import ACTIVATIONS
from unified_mm.nn.layers import Dense, partitioned
from unified_mm.nn.tokens import Group, Tokens, blank, single_document

MEASURED = 500  # sounds that the mean and the deviation are taken from, spread over the data
READ_AT_A_TIME = 50
READ_WINDOWS = 8  # of a file's windows, the most that are held at a time
OCTAVES = 125.0 * 2 ** np.arange(7)  # Hz, between which `equalise` draws lines
STEMS = ("linear", "convolution")


@dataclass(frozen=True)
class AudioModality:
    """Sounds of at most `seconds`, as 16 kHz samples, heard as spectrograms.

    Of a longer one training hears a random part, and evaluation `windows` of it. A part of a record
    is a file, or `{"file": FILE, "start": SECONDS}` of one, or `{"made": KIND, "seed": NUMBER}`,
    silence, noise or, with a `file` too, any stretch of it, that training draws anew each time.

    Attributes:
      name: its key under `config.model.modalities`.
      seconds: of the longest sound that is heard whole.
      preset: the kind of spectrogram: 'whisper', or 'kaldi' (AST, ImageBind).
      mels: bands of frequency.
      mean, std: by which spectrograms are normalised; std 0 takes both from the training data, and
        the run keeps them.
      patch: frames (of 10 ms) and bands of a token.
      stride: frames and bands from the beginning of one patch to that of the next; (0, 0) is side
        by side. With a stride of their own patches may overlap, and what fills none at the end and
        at the top is left out, as a convolution does (AST).
      stem: 'linear', one dense map of a patch; or 'convolution', two convolutions in time, each of
        three frames and the second at every other one (Whisper): a token is of two frames and all
        bands.
      class_tokens: learned tokens that come before all others (AST has two).
      positions: initial values of the learned positions of time and band: 'grid', 'line', 'random',
        or 'none', as those of images.
      modality_embedding: whether a learned embedding of the modality is added.
      mask_frames, mask_mels: the widest stretch of time, and of bands, that training blanks (Park
        et al. 2019, SpecAugment).
      gain: the most decibels by which training makes a sound louder or softer.
      speed: the most by which training plays a sound faster or slower, and so higher or lower (Ko
        et al. 2015): 1.1 is 0.91 to 1.1 times, of which it is never made longer than `seconds`.
      equalise: the most decibels by which training makes a frequency louder or softer, as another
        microphone or room would (Nam et al. 2022, FilterAugment, with linear steps).
      centre: whether each sound's mean in each band is taken off (Atal 1974), so that what does not
        change within a sound, such as the microphone, tells nothing.
      roll: whether training turns a sound round in time, so that it begins anywhere.
      longer: 'crop' hears longer sounds as above; 'leave_out' names them and leaves them out, for
        texts that are of whole sounds.
      attend_padding: whether what comes after the end of a sound is heard too, up to `seconds`, as
        published models do: by 'whisper' as silence, by 'kaldi' as zeros in the logarithm.
    """

    # What can be made of which no text tells.
    made: ClassVar[tuple[str, ...]] = ("silence", "noise")
    suffixes: ClassVar[frozenset[str]] = sounds.SUFFIXES
    from_data: ClassVar[tuple[str, ...]] = ("std", "mean")

    name: str
    seconds: float = option(10.0, above=0)
    preset: str = option("whisper", choices=tuple(PRESETS))
    mels: int = option(80, least=1)
    mean: float = 0.0
    std: float = option(0.0, least=0)
    patch: tuple[int, int] = (16, 16)
    stride: tuple[int, int] = (0, 0)
    stem: str = option("linear", choices=STEMS)
    class_tokens: int = option(0, least=0)
    positions: str = option("grid", choices=(*START, "none"))
    modality_embedding: bool = True
    mask_frames: int = option(0, least=0)
    mask_mels: int = option(0, least=0)
    gain: float = option(0.0, least=0)
    speed: float = option(1.0, least=1)
    equalise: float = option(0.0, least=0)
    centre: bool = False
    roll: bool = False
    longer: str = option("crop", choices=("crop", "leave_out"))
    attend_padding: bool = False

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> AudioModality:
        where = f"model.modalities.{name}"
        built: AudioModality = build_options(cls, options, where, name=name)
        if min(built.patch) < 1 or (not built.overlaps and built.mels % built.patch[1]):
            raise ValueError(
                f"{where}.mels={built.mels} is no multiple of the bands of {where}.patch="
                f"{built.patch}"
            )
        if built.overlaps and (min(built.stride) < 1 or min(built.grid) < 1):
            raise ValueError(
                f"{where}.stride={built.stride}: give frames and bands of at least 1, and seconds "
                f"and mels that fill {where}.patch={built.patch}"
            )
        whole = {"patch": (2, built.mels), "stride": (0, 0)}
        for field, value in whole.items() if built.stem == "convolution" else ():
            if (given := getattr(built, field)) != value:
                raise ValueError(
                    f"{where}.{field}={given}: tokens of {where}.stem='convolution' are of two "
                    f"frames and all bands; set it to {value}"
                )
        return built

    @property
    def samples(self) -> int:
        """Samples of the longest sound, S."""
        return round(self.seconds * sounds.RATE)

    @property
    def frames(self) -> int:
        """Frames of the longest sound."""
        return PRESETS[self.preset].frames(self.samples)

    @property
    def overlaps(self) -> bool:
        """Whether patches have a stride of their own."""
        return self.stride != (0, 0)

    @property
    def strides(self) -> tuple[int, int]:
        """Frames and bands from one patch to the next."""
        return self.stride if self.overlaps else self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in time and in frequency."""
        return self.grid_of(self.frames)

    def grid_of(self, frames: int) -> tuple[int, int]:
        """Returns the patches in time and in frequency of so many frames."""
        if not self.overlaps:
            return -(-frames // self.patch[0]), self.mels // self.patch[1]
        (of_patch, bands), (step, up) = self.patch, self.strides
        return 1 + (frames - of_patch) // step, 1 + (self.mels - bands) // up

    @property
    def tokens_per_step(self) -> int:
        """Tokens of each step in time."""
        return self.grid[1]

    @property
    def whole(self) -> bool:
        """Whether every sound is heard from its beginning to its end."""
        return self.longer == "leave_out" and not self.roll

    def steps_of(self, part: Any) -> int:
        """Returns the steps in time, as tokens, of a part of a record."""
        file, start = place_of(part)
        frames = self._there(round((sounds.seconds_of(file) - start) * sounds.RATE))
        return min(-(-frames // self.strides[0]), self.grid[0])

    def fault(self, part: Any) -> str:
        """Returns what is wrong with a part of a record: its length, where that is asked for."""
        if self.longer == "crop" or is_made(part):
            return ""
        file, start = place_of(part)
        try:
            seconds = sounds.seconds_of(file)
        except sounds.SoundError:
            return ""  # it counts as unreadable when it is read
        return self._too_long(seconds - start)

    def _too_long(self, seconds: float) -> str:
        if seconds <= self.seconds + 0.5 / sounds.RATE:
            return ""
        field = f"model.modalities.{self.name}.seconds"
        return f"longer than {field}={self.seconds:g}, and may not be cut"

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if self.name not in record.parts:
            return self.absent()
        wave = self._wave(record.parts[self.name], rng)
        if rng is None:
            return self.arrays(wave)
        if self.speed > 1:
            wave = self._played(wave, rng)
        if self.equalise:
            wave = _equalised(wave, self.equalise, rng)
        if self.roll:
            wave = np.roll(wave, rng.integers(len(wave)))
        drawn = {
            "gain": np.array(10 ** (rng.uniform(-self.gain, self.gain) / 20), np.float32),
            "masks": np.array(
                [_stretch(rng, self.mask_frames, self._there(len(wave))),
                 _stretch(rng, self.mask_mels, self.mels)],
                np.int32,
            ),
        }  # fmt: skip
        return self.arrays(wave) | drawn

    def _wave(self, part: Any, rng: np.random.Generator | None) -> np.ndarray:
        if is_made(part):
            drawn = np.random.default_rng(part["seed"]) if rng is None else rng
            length = int(drawn.uniform(0.2, 1.0) * self.samples)
            if "file" in part:
                return _stretch_of(part["file"], length / sounds.RATE, drawn)
            return sounds.silence_or_noise(part["made"], length, drawn)
        file, start = place_of(part)

        def begin(length: float) -> float:
            if self.longer == "leave_out" and (fault := self._too_long(length - start)):
                raise sounds.SoundError(sounds.name_of(file), fault)
            room = length - start - self.seconds
            return start + (rng.uniform(0, room) if rng is not None and room > 0 else 0.0)

        return sounds.decode(file, begin, self.seconds)

    def _played(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a sound played at a drawn speed, at which all of it is still heard."""
        longest = max(self.samples / len(wave), 1 / self.speed)
        factor = min(self.speed ** rng.uniform(-1, 1), longest)
        # Medium quality: a quarter of the time, and more than an augmentation needs.
        played: np.ndarray = sounds.library("soxr").resample(wave, 1.0, factor, "MQ")
        return played

    def _there(self, samples: int) -> int:
        preset, samples = PRESETS[self.preset], min(samples, self.samples)
        return -(-samples // HOP) if preset.centred else preset.frames(samples)

    def read(self, content: bytes) -> dict[str, np.ndarray]:
        return self.arrays(self._wave(content, None))

    def read_windows(self, part: Any) -> list[dict[str, np.ndarray]]:
        """Returns the arrays of the `windows` of a part, or of what a file holds.

        Of very many they are `READ_WINDOWS`, evenly spread.
        """
        parts = [part] if self.longer == "leave_out" else self.windows(part, READ_WINDOWS)
        return [self.arrays(self._wave(each, None)) for each in parts]

    def arrays(self, wave: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of int16 samples, of which more than `seconds` are left out."""
        wave = wave[: self.samples]
        samples = np.pad(wave, (0, self.samples - len(wave)))
        found = {
            "samples": samples,
            "length": np.array(len(wave), np.int32),
            "present": np.array(True),
        }
        return self.absent() | found

    def absent(self) -> dict[str, np.ndarray]:
        return {
            "samples": np.zeros(self.samples, np.int16),
            "length": np.array(0, np.int32),
            "gain": np.array(1, np.float32),
            "masks": np.zeros((2, 2), np.int32),
            "present": np.array(False),
        }

    def windows(self, part: Any, most: int | None = None) -> list[Any]:
        """Returns the parts of `seconds` that are heard of a sound, evenly spread.

        They cover all of it, but where these would be more than `most`.
        """
        if is_made(part):
            return [part]
        file, start = place_of(part)
        length = sounds.seconds_of(file) - start
        if length <= self.seconds + 0.5 / sounds.RATE:
            return [part]
        count = int(np.ceil(length / self.seconds))
        places = np.linspace(0, count - 1, min(count, most or count)).round()
        starts = start + places * (length - self.seconds) / (count - 1)
        return [{"file": file, "start": float(each)} for each in starts]

    def mix(
        self, one: dict[str, np.ndarray], other: dict[str, np.ndarray], rng: np.random.Generator,
        decibels: float,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Returns one sound with another added, louder or softer by up to so many decibels.

        A sum that int16 cannot hold is made softer as a whole.
        """
        factor = 10 ** (rng.uniform(-decibels, decibels) / 20)
        wave = one["samples"].astype(np.float32) + factor * other["samples"]
        wave *= min(1.0, 32767 / max(float(np.abs(wave).max()), 1.0))
        length = np.maximum(one["length"], other["length"])
        return one | {"samples": np.rint(wave).astype(np.int16), "length": length}

    def measure(self, records: Sequence[Record]) -> dict[str, Any]:
        """Returns the mean and the deviation of the spectrograms of `MEASURED` sounds.

        Raises:
          ValueError: no record has one, or all are alike.
        """
        heard = [record for record in records if self.name in record.parts]
        if not heard:
            raise ValueError(
                f"model.modalities.{self.name}: no example has it, so that its mean and std cannot "
                "be taken from the data"
            )
        places = np.linspace(0, len(heard) - 1, min(len(heard), MEASURED), dtype=int)
        chosen = [heard[place] for place in places]
        plain = replace(self, mean=0.0, std=1.0, attend_padding=False)
        spectrum = jax.jit(lambda batch: spectrogram(plain, batch)[:2])
        sums = np.zeros(3)
        for first in range(0, len(chosen), READ_AT_A_TIME):
            rows = [self.prepare(record, None) for record in chosen[first : first + READ_AT_A_TIME]]
            rows += [self.absent()] * (READ_AT_A_TIME - len(rows))
            batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
            x, there = (np.asarray(each) for each in spectrum(batch))
            x = x[there].astype(np.float64)
            sums += [x.size, x.sum(), np.square(x).sum()]
        mean = sums[1] / sums[0]
        std = float(np.sqrt(max(sums[2] / sums[0] - mean**2, 0.0)))
        if not std > 1e-6:
            raise ValueError(f"model.modalities.{self.name}: all its sounds are silent or alike")
        return {"mean": float(np.float32(mean)), "std": float(np.float32(std))}

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        if not self.std:
            raise ValueError(
                f"model.modalities.{self.name}.std=0: the command takes mean and std from the "
                "training data; elsewhere, give both"
            )
        return AudioEmbedder(self, width, dtype)


def is_made(part: Any) -> bool:
    """Returns whether a record's part is no file but what is made."""
    return isinstance(part, Mapping) and "made" in part


def place_of(part: Any) -> tuple[File | bytes, float]:
    """Returns the file of a record's part, or what it holds, and the second at which it begins."""
    if isinstance(part, Mapping):
        return part["file"], float(part.get("start", 0.0))
    return part, 0.0


def _stretch_of(file: File, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Returns at most so many seconds of a file, from anywhere in it."""
    return sounds.decode(file, lambda whole: rng.uniform(0, max(whole - seconds, 0)), seconds)


def _equalised(wave: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Returns a sound with a gain drawn for each octave or so, straight lines between them."""
    spectrum = np.fft.rfft(wave)
    hertz = np.linspace(0, sounds.RATE / 2, len(spectrum))
    gains = rng.uniform(-decibels, decibels, len(OCTAVES))
    spectrum *= 10 ** (np.interp(np.log2(hertz + 1), np.log2(OCTAVES), gains) / 20)
    found = np.fft.irfft(spectrum, len(wave))
    # What int16 cannot hold is made softer as a whole.
    found *= min(1.0, 32767 / max(float(np.abs(found).max()), 1.0))
    return np.rint(found).astype(np.int16)


def _stretch(rng: np.random.Generator, widest: int, room: int) -> tuple[int, int]:
    """Returns the start and the width of a stretch that is blanked."""
    width = int(rng.integers(min(widest, room) + 1)) if widest else 0
    return int(rng.integers(room - width + 1)), width


def spectrogram(
    audio: AudioModality, batch: Mapping[str, Array]
) -> tuple[Float[Array, "B N mels"], Bool[Array, "B N"], Bool[Array, "B N mels"]]:
    """Returns normalised log-mel frames, which of them are heard, and what is not blanked.

    Args:
      audio: the modality.
      batch: `samples` [B, S] (int16, or float of its range), `length`, `gain` and `present` [B],
        `masks` [B, 2, 2]: the start and the width that are blanked, in frames and in bands.
    """
    preset = PRESETS[audio.preset]
    length = jnp.where(batch["present"], batch["length"], 0)
    heard = jnp.arange(batch["samples"].shape[1])[None] < length[:, None]
    wave = blank(batch["samples"].astype(jnp.float32), heard) / 32768.0
    wave = wave * jnp.where(batch["present"], batch["gain"], 1.0)[:, None]
    frames = preset.frames(wave.shape[1])
    there = jnp.arange(frames)[None] < preset.frames_of(length)[:, None]
    x = log_mel(audio.preset, wave, audio.mels, there)
    if audio.centre:
        count = jnp.maximum(there.sum(1), 1).astype(x.dtype)[:, None, None]
        x = x - blank(x, there).sum(1, keepdims=True) / count
    if audio.attend_padding:
        x = x if preset.centred else blank(x, there)
        there = jnp.broadcast_to(batch["present"][:, None], there.shape)
    x = (x - audio.mean) / audio.std
    place = [jnp.arange(frames)[None, :, None], jnp.arange(audio.mels)[None, None]]
    masks = batch["masks"][:, :, :, None, None]
    left = ~(
        ((place[0] >= masks[:, 0, 0]) & (place[0] < masks[:, 0, 0] + masks[:, 0, 1]))
        | ((place[1] >= masks[:, 1, 0]) & (place[1] < masks[:, 1, 0] + masks[:, 1, 1]))
    )
    return x, there, left


class AudioEmbedder(nn.Module):
    """A spectrogram through the stem, plus positions and the modality's embedding.

    Tokens go by time, then by frequency, after the class tokens.
    """

    audio: AudioModality
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> Tokens:
        """Embeds a batch as `spectrogram` takes it; seconds may be other than the modality's."""
        a = self.audio
        x, there, left = spectrogram(a, batch)
        x = blank(x, there) * left.astype(x.dtype)
        (of_patch, bands), (step, up) = a.patch, a.strides
        rows, (down, across) = x.shape[0], a.grid_of(x.shape[1])
        missing = max((down - 1) * step + of_patch - x.shape[1], 0)
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0))).astype(self.dtype)
        there = jnp.pad(there, ((0, 0), (0, missing)))
        if a.stem == "convolution":
            x = self.convolved(x, there)
        else:
            frames = np.arange(down)[:, None] * step + np.arange(of_patch)
            levels = np.arange(across)[:, None] * up + np.arange(bands)
            patches = x[:, frames][..., levels].transpose(0, 1, 3, 2, 4)
            x = self.dense("patches", patches.reshape(rows, down * across, of_patch * bands))
        if a.positions != "none":
            start = partitioned(START[a.positions], None, None, "embed")
            table = self.param("positions", start, (*a.grid, self.width))
            if table.shape[0] < down:
                raise ValueError(
                    f"sounds of {down * of_patch * HOP / sounds.RATE:g} seconds, but the model "
                    f"learns positions of {a.seconds:g} (model.modalities.{a.name}.seconds)"
                )
            x = x + table[:down].reshape(down * across, self.width).astype(self.dtype)
        if a.modality_embedding:
            vector = partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
            x = x + self.param("modality", *vector).astype(self.dtype)
        # Frames that are heard come first: a patch holds one if its own first is.
        valid = jnp.repeat(there[:, ::step][:, :down], across, axis=1)
        first = PRESETS[a.preset].first_centre
        times = first + (np.arange(down) * step + (of_patch - 1) / 2) * HOP / sounds.RATE
        coords = np.zeros((down * across, 3), np.float32)
        coords[:, 1] = np.tile((np.arange(across) + 0.5) / across, down)
        time = np.repeat(times.astype(np.float32), across)
        if count := a.class_tokens:
            start = partitioned(nn.initializers.normal(0.02), None, "embed")
            learned = self.param("class_tokens", start, (count, self.width)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(learned, (rows, *learned.shape)), x], axis=1)
            present = jnp.broadcast_to(batch["present"][:, None], (rows, count))
            valid = jnp.concatenate([present, valid], axis=1)
            time, coords = np.pad(time, (count, 0)), np.pad(coords, ((count, 0), (0, 0)))
        group = Group(a.name, a.name, x.shape[1])
        placed = single_document(valid, group, time, coords)
        return Tokens(blank(x, valid), placed)

    def dense(self, name: str, x: Float[Array, "B N values"]) -> Float[Array, "B N D"]:
        found: Array = Dense((self.width,), (None,), ("embed",), dtype=self.dtype, name=name)(x)
        return found

    def convolved(
        self, x: Float[Array, "B N mels"], there: Bool[Array, "B N"]
    ) -> Float[Array, "B half D"]:
        """Returns what two convolutions in time make of frames (Radford et al. 2022, 2.2)."""
        activation = ACTIVATIONS["gelu_exact"]
        x = blank(activation(self.dense("convolution_1", with_neighbours(x))), there)
        return activation(self.dense("convolution_2", with_neighbours(x)[:, ::2]))


def with_neighbours(x: Float[Array, "B N values"]) -> Float[Array, "B N more"]:
    """Returns the frame before each, itself, and the one after, zeros beyond the ends."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, :-2], x, padded[:, 2:]], axis=-1)
