"""Images: patches of pixels become tokens (Dosovitskiy et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unified_mm.data import images
from unified_mm.data.records import Record
from unified_mm.modalities.tokens import Group, Tokens, blank, single_document
from unified_mm.parallel.layers import Dense, partitioned

STEMS = ("linear", "hierarchical")
PART = 4  # pixels on a side of the smallest part that the hierarchical stem looks at


@dataclass(frozen=True)
class ImageModality:
    """RGB images of `size` x `size` pixels, cut into patches of `patch` x `patch`.

    Attributes:
      stem: 'linear', one dense map of a patch, or 'hierarchical', an MLP of parts within parts.
      crop_scale: smallest and largest share of the picture's area that a training crop keeps.
      crop_ratio: narrowest and widest shape (width / height) of a training crop.
      mirror: whether training flips left and right, where no text of the record names a side.
      decoder: 'pillow' or 'opencv'.
    """

    name: str
    size: int
    patch: int
    stem: str
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    mirror: bool
    decoder: str

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> ImageModality:
        data = resources.data
        size, patch = int(data.image_size), int(options["patch"])
        if options["stem"] not in STEMS:
            raise ValueError(
                f"model.modalities.{name}.stem={options['stem']!r}: one of {', '.join(STEMS)}"
            )
        if options["stem"] == "hierarchical" and patch % PART:
            raise ValueError(
                f"model.modalities.{name}.patch={patch}: the hierarchical stem needs a multiple "
                f"of {PART}"
            )
        if size % patch:
            raise ValueError(
                f"data.image_size={size} is no multiple of model.modalities.{name}.patch={patch}"
            )
        return cls(
            name=name,
            size=size,
            patch=patch,
            stem=str(options["stem"]),
            crop_scale=tuple(data.crop_scale),
            crop_ratio=tuple(data.crop_ratio),
            mirror=bool(data.mirror),
            decoder=str(data.decoder),
        )

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if record.image is None:
            return self.absent()
        if rng is None:
            pixels = images.decode(record.image, at_least=self.size, backend=self.decoder)
            view = images.evaluation_view(pixels, self.size)
        else:
            at_least = images.least_side(self.size, self.crop_scale)
            view = images.training_view(
                images.decode(record.image, at_least=at_least, backend=self.decoder),
                self.size,
                rng,
                scale=self.crop_scale,
                ratio=self.crop_ratio,
                mirror=self.mirror and record.mirrorable,
            )
        return {"pixels": view, "present": np.array(True)}

    def absent(self) -> dict[str, np.ndarray]:
        return {
            "pixels": np.zeros((self.size, self.size, 3), np.uint8),
            "present": np.array(False),
        }

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        side = self.size // self.patch
        return ImageEmbedder(self.name, self.patch, self.stem, (side, side), width, dtype)


class ImageEmbedder(nn.Module):
    """Patches through the stem, plus a learned 2D position and the modality's embedding.

    `grid` is the number of patches (down, across) that positions are learned for; pictures of
    another size get them interpolated.
    """

    name_of_group: str
    patch: int
    stem: str
    grid: tuple[int, int]
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> Tokens:
        """`pixels` uint8 or float [B, height, width, 3] in 0..255, `present` [B] -> Tokens."""
        pixels = blank(batch["pixels"].astype(self.dtype), batch["present"])
        patches = self._patches(pixels / 127.5 - 1.0)
        down, across = patches.shape[1:3]
        x = Dense((self.width,), (None,), ("embed",), dtype=self.dtype, name="patches")(
            patches.reshape(patches.shape[0], down * across, -1)
        )
        table = self.param(
            "positions",
            partitioned(_sine_positions, None, None, "embed"),
            (*self.grid, self.width),
        )
        modality = self.param(
            "modality", partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
        )
        positions = resize_positions(table, (down, across)).reshape(down * across, self.width)
        x = x + (positions + modality).astype(self.dtype)
        valid = jnp.broadcast_to(batch["present"][:, None], x.shape[:2])
        group = Group(self.name_of_group, self.name_of_group, down * across)
        return Tokens(blank(x, valid), single_document(valid, group))


    def _patches(
        self, pixels: Float[Array, "B height width C"]
    ) -> Float[Array, "B down across P"]:
        """Patches as rows of numbers: pixels, or features of their parts.

        The hierarchical stem follows Touvron et al. 2022 ("Three things everyone should know about
        vision transformers", section 6): no patch sees another, so what is absent stays apart.
        """
        if self.stem == "linear":
            return patchify(pixels, self.patch)
        parts = patchify(pixels, PART)
        features = Dense((self.width // 2,), (None,), (None,), dtype=self.dtype, name="parts")
        return patchify(nn.gelu(features(parts)), self.patch // PART)


def patchify(
    pixels: Float[Array, "B height width C"], patch: int
) -> Float[Array, "B down across P"]:
    """Cut pictures into squares: P = patch * patch * C, row by row, channels last."""
    batch, height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"a picture of {height}x{width} pixels is not cut evenly by {patch}")
    x = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)


def resize_positions(
    table: Float[Array, "down across D"], grid: tuple[int, int]
) -> Float[Array, "down2 across2 D"]:
    """Learned positions for another number of patches, bilinearly interpolated."""
    if table.shape[:2] == grid:
        return table
    return jax.image.resize(table, (*grid, table.shape[-1]), "bilinear")


def _sine_positions(key: Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """A start that already tells rows from columns: half the width sines of each coordinate."""
    del key
    down, across, width = shape
    if width % 4:
        raise ValueError(f"the model's width {width} must be a multiple of 4")
    rates = 1.0 / 100.0 ** jnp.linspace(0.0, 1.0, width // 4)

    def waves(count: int) -> Array:
        angles = jnp.arange(count)[:, None] * rates
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    rows = jnp.broadcast_to(waves(down)[:, None], (down, across, width // 2))
    columns = jnp.broadcast_to(waves(across)[None], (down, across, width // 2))
    return jnp.concatenate([rows, columns], axis=-1).astype(dtype)
