"""Video: tubelets of frames become tokens (Arnab et al. 2021, ViViT, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from unified_mm.config import build_options, option, read_options
from unified_mm.data import clips, images
from unified_mm.data.records import Record
from unified_mm.modalities.image import START, patch_centres, patchify
from unified_mm.nn.layers import Dense, partitioned
from unified_mm.nn.tokens import Group, Tokens, blank, single_document

STEMS = ("linear", "difference")
FIXED = "fixed"  # positions that are not learned


@dataclass(frozen=True)
class VideoModality:
    """Clips of `frames` RGB pictures, which are `data.image_size` pixels square.

    Frames are taken by the clip's own clock, equally far apart; training draws where the first one
    lies, evaluation takes the middle. A picture is a video of one frame.

    Attributes:
      name: its key under `config.model.modalities`.
      size: pixels on a side, as the model sees them.
      frames: that are taken of a clip.
      seconds: that they are spread over, a random part of a longer clip in training and its middle
        in evaluation; a shorter one has fewer frames. 0 spreads them over the whole of each clip.
      tubelet: frames of a token.
      patch: pixels on a side of a token.
      stem: 'linear', one dense map of a tubelet; or 'difference', another one beside it of what
        each frame has other than the one before.
      positions: initial values of the learned positions of row and column, as those of images, with
        learned ones of time beside them; or 'fixed', sines of each tubelet's number (VideoMAE); or
        'none'.
      modality_embedding: whether a learned embedding of the modality is added.
      mean, std: of each channel, in 0..1, by which pixels are normalised.
      crop_scale, crop_ratio, mirror, resampling, fit: of `config.data`, as for images; all frames
        of a clip are cropped and mirrored alike.
    """

    suffixes: ClassVar[frozenset[str]] = clips.SUFFIXES

    name: str
    size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    mirror: bool
    resampling: str
    fit: str
    frames: int = option(8, least=1)
    seconds: float = option(0.0, least=0)
    tubelet: int = option(2, least=1)
    patch: int = option(8, least=1)
    stem: str = option("linear", choices=STEMS)
    positions: str = option("grid", choices=(*START, FIXED, "none"))
    modality_embedding: bool = True
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> VideoModality:
        where, data = f"model.modalities.{name}", resources.data
        shared = read_options(cls, {field: data[field] for field in SHARED}, "data")
        built: VideoModality = build_options(
            cls, options, where, name=name, size=data.image_size, **shared
        )
        for field, whole in (("frames", built.tubelet), ("size", built.patch)):
            said = "data.image_size" if field == "size" else f"{where}.{field}"
            if getattr(built, field) % whole:
                part = "patch" if field == "size" else "tubelet"
                raise ValueError(
                    f"{said}={getattr(built, field)} is no multiple of {where}.{part}={whole}"
                )
        return built

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tubelets in time, down and across."""
        side = self.size // self.patch
        return self.frames // self.tubelet, side, side

    @property
    def steps(self) -> int:
        """Moments that the tokens are of, the same number each."""
        return self.grid[0]

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if self.name not in record.parts:
            return self.absent()
        with clips.opened(record.parts[self.name]) as clip:
            return self._arrays(clip, rng, record.mirrorable)

    def read(self, content: bytes) -> dict[str, np.ndarray]:
        with clips.opened(content, limited=True) as clip:
            return self._arrays(clip, None, False)

    def read_windows(self, part: Any) -> list[dict[str, np.ndarray]]:
        """Returns the arrays of a part, or of what an uploaded file holds, which has limits."""
        if isinstance(part, bytes):
            return [self.read(part)]
        return [self.prepare(Record(0, {self.name: part}, (), False), None)]

    def longer(self, part: Any) -> bool:
        """Returns whether a clip is longer than what is taken of it."""
        if not self.seconds:
            return False
        with clips.opened(part) as clip:
            return clip.seconds > self.seconds

    def times(self, seconds: float, rng: np.random.Generator | None) -> Float[np.ndarray, " S"]:
        """Returns the times at which the frames of a clip of some seconds are taken."""
        span = self.seconds or seconds
        room = max(seconds - span, 0.0)
        start, within = (room / 2, 0.5) if rng is None else (rng.uniform(0, room), rng.random())
        times = start + (np.arange(self.frames) + within) * span / self.frames
        there = times < seconds
        # A clip that is over before its first time, such as a picture, has that of its beginning.
        return times[there] if there.any() else np.zeros(1)

    def _arrays(
        self, clip: clips.Clip, rng: np.random.Generator | None, mirrorable: bool
    ) -> dict[str, np.ndarray]:
        times = self.times(clip.seconds, rng)
        found, drawn = self.absent(), 0 if rng is None else int(rng.integers(2**63))
        for number, frame in enumerate(clips.frames_at(clip, times)):
            view = None if rng is None else np.random.default_rng(drawn)
            found["frames"][number] = self._view(frame, view, mirrorable)
        found["times"][: len(times)] = times
        found["length"] = np.array(len(times), np.int32)
        return found | {"present": np.array(True)}

    def _view(
        self,
        frame: UInt8[np.ndarray, "height width 3"],
        rng: np.random.Generator | None,
        mirrorable: bool,
    ) -> UInt8[np.ndarray, "size size 3"]:
        if rng is None:
            return images.evaluation_view(
                frame, self.size, resampling=self.resampling, fit=self.fit
            )
        return images.training_view(
            frame,
            self.size,
            rng,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            mirror=self.mirror and mirrorable,
            resampling=self.resampling,
        )

    def absent(self) -> dict[str, np.ndarray]:
        return {
            "frames": np.zeros((self.frames, self.size, self.size, 3), np.uint8),
            "times": np.zeros(self.frames, np.float32),
            "length": np.array(0, np.int32),
            "present": np.array(False),
        }

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        return VideoEmbedder(self, width, dtype)


SHARED = ("crop_scale", "crop_ratio", "mirror", "resampling", "fit")  # with images


class VideoEmbedder(nn.Module):
    """Tubelets through the stem, plus positions and the modality's embedding.

    Tokens go by time, then row by row.
    """

    video: VideoModality
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> Tokens:
        """Embeds `frames` [B, S, size, size, 3] in 0..255, `times` [B, S], `length`, `present`."""
        v = self.video
        x, times, there = self.filled(batch)
        mean, std = (255.0 * jnp.array(value) for value in (v.mean, v.std))
        x = ((x - mean) / std).astype(self.dtype)
        tokens = self.dense("patches", tubelets(x, v.tubelet, v.patch))
        if v.stem == "difference":
            change = x - jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
            tokens = tokens + self.dense("differences", tubelets(change, v.tubelet, v.patch))
        rows, steps, down, across = tokens.shape[:4]
        if v.positions == FIXED:
            fixed = sines_of_numbers(steps * down * across, self.width)
            tokens = tokens + fixed.reshape(tokens.shape[1:]).astype(self.dtype)
        elif v.positions != "none":
            first = partitioned(START[v.positions], None, None, "embed")
            tokens = tokens + self.param("positions", first, (down, across, self.width)).astype(
                self.dtype
            )
            start = START["random" if v.positions == "random" else "line"]
            first = partitioned(start, None, None, "embed")
            order = self.param("time_positions", first, (steps, 1, self.width))
            tokens = tokens + order[:, :, None].astype(self.dtype)
        if v.modality_embedding:
            vector = partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
            tokens = tokens + self.param("modality", *vector).astype(self.dtype)
        places = down * across
        tokens = tokens.reshape(rows, steps * places, self.width)
        valid = jnp.repeat(there.reshape(rows, steps, v.tubelet)[:, :, 0], places, axis=1)
        group = Group(v.name, v.name, steps * places, valid_first=True)
        coords = np.tile(patch_centres(down, across), (steps, 1))
        placed = single_document(valid, group, np.zeros(steps * places, np.float32), coords)
        middle = times.reshape(rows, steps, v.tubelet).mean(2)
        placed = placed.replace(time=jnp.repeat(middle, places, axis=1))  # type: ignore[attr-defined]
        return Tokens(blank(tokens, valid), placed)

    def dense(
        self, name: str, x: Float[Array, "B S down across values"]
    ) -> Float[Array, "B S down across D"]:
        found: Array = Dense((self.width,), (None,), ("embed",), dtype=self.dtype, name=name)(x)
        return found

    def filled(
        self, batch: Mapping[str, Array]
    ) -> tuple[Float[Array, "B S height width 3"], Float[Array, "B S"], Bool[Array, "B S"]]:
        """Returns frames and times, after the last the last again, and which frames there are.

        So a tubelet that is begun is full, and a picture's own holds nothing but the picture.
        """
        frames = batch["frames"]
        length = jnp.where(batch["present"], batch["length"], 0)
        number = jnp.arange(frames.shape[1])[None]
        there = number < length[:, None]
        taken = jnp.minimum(number, jnp.maximum(length[:, None] - 1, 0))
        rows = jnp.arange(frames.shape[0])[:, None]
        shown = blank(frames.astype(jnp.float32), there)[rows, taken]
        return shown, blank(batch["times"].astype(jnp.float32), there)[rows, taken], there


def sines_of_numbers(count: int, width: int) -> Float[np.ndarray, "count D"]:
    """Returns the sine and cosine of each number at falling rates (Vaswani et al. 2017, 3.5)."""
    if width % 2:
        raise ValueError(f"positions='{FIXED}' needs an even width, not {width}")
    angles = np.arange(count)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(count, width)


def tubelets(
    frames: Float[Array, "B frames height width channels"], tubelet: int, patch: int
) -> Float[Array, "B S down across values"]:
    """Cuts clips into tubelets of tubelet * patch * patch * channels values, frame by frame."""
    rows, count = frames.shape[:2]
    x = patchify(frames.reshape(rows * count, *frames.shape[2:]), patch)
    x = x.reshape(rows, count // tubelet, tubelet, *x.shape[1:])
    return jnp.moveaxis(x, 2, 4).reshape(rows, count // tubelet, *x.shape[3:5], -1)


def inflated(kernel: Float[np.ndarray, "values D"], tubelet: int) -> Float[np.ndarray, "more D"]:
    """Returns the kernel of tubelets that sees of each the middle frame, as one of pictures does.

    Arnab et al. 2021, section 3.4, "central frame initialisation".
    """
    found = np.zeros((tubelet, *kernel.shape), kernel.dtype)
    found[tubelet // 2] = kernel
    return found.reshape(-1, kernel.shape[1])
