"""Images: patches of pixels become tokens (Dosovitskiy et al. 2021, section 3.1)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from unified_mm.config import build_options, option
from unified_mm.data import images
from unified_mm.data.records import Image, Record
from unified_mm.nn.layers import Dense, Norm, partitioned
from unified_mm.nn.options import constructor, frozen
from unified_mm.nn.tokens import Group, Tokens, blank, patch_centres, single_document

PART = 4  # pixels on a side of the smallest part of a patch in the hierarchical stem
PATCHES = ("linear", "hierarchical")  # stems in which no patch sees another
# Stems that see the whole picture: modules as `nn.convolution` says.
STEMS = {
    "efficientnet_lite": "unified_mm.nn.convolution:EfficientNetLite",
    "nfnet": "unified_mm.nn.convolution:NFNet",
}


@dataclass(frozen=True)
class ImageModality:
    """RGB images of `size` x `size` pixels, cut into patches.

    Attributes:
      name: its key under `config.model.modalities`.
      size: pixels on a side, as the model sees them.
      embedding: options of the embedder.
      crop_scale: smallest and largest share of the image's area in a training crop.
      crop_ratio: smallest and largest width / height of a training crop.
      mirror: whether training flips left and right, where no text of the record names a side.
      decoder: 'pillow' or 'opencv'.
      resampling: 'bilinear' or 'bicubic', from the image's pixels to `size`.
      fit: how evaluation makes an image square (`data.images.evaluation_view`).
      sharp_crops: whether a JPEG is decoded so large that no training crop is enlarged whatever its
        shape.
      views: training views that there are of an image, known beforehand; 0 draws ever new ones.
      view_seed: what these views are drawn by.
    """

    suffixes: ClassVar[frozenset[str]] = images.SUFFIXES

    name: str
    size: int
    embedding: ImageEmbedding
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    mirror: bool
    decoder: str
    resampling: str = option(choices=tuple(images.RESAMPLINGS))
    fit: str = option(choices=images.FITS)
    sharp_crops: bool = False
    views: int = option(0, least=0)
    view_seed: int = option(0, least=0, below=2**32)

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> ImageModality:
        data, where = resources.data, f"model.modalities.{name}"
        size = data.image_size
        own = {"stem_options": frozen({"stem": options.get("stem_options", {})})["stem"]}
        embedding = build_options(ImageEmbedding, options, where, grid=(0, 0), **own)
        side = embedding.grid_side(size, where)
        embedding = replace(embedding, grid=(side, side))
        built: ImageModality = build_options(
            cls, data, "data", name=name, size=size, embedding=embedding
        )
        for field in ("crop_scale", "crop_ratio"):
            least, most = getattr(built, field)
            if not 0 < least <= most:
                raise ValueError(f"data.{field}={(least, most)}: give (least, most) above 0")
        return built

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if self.name not in record.parts:
            return self.absent()
        if rng is not None and self.views:
            return self.prepare_view(record, self.draw_view(record, rng))
        view = self.view(record.parts[self.name], rng, record.mirrorable)
        return {"pixels": view, "present": np.array(True)}

    def count_views(self, record: Record) -> int:
        """Returns how many views of an example are known beforehand."""
        return self.views if self.name in record.parts else 0

    def draw_view(self, record: Record, rng: np.random.Generator) -> int:
        """Returns the number of one of `views`, drawn."""
        return int(rng.integers(self.views))

    def prepare_view(self, record: Record, number: int) -> dict[str, np.ndarray]:
        """Returns the arrays of one of an example's `views`."""
        if self.name not in record.parts:
            return self.absent()
        key = np.array([self.view_seed, zlib.crc32(repr(record.id).encode())], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
        view = self.view(record.parts[self.name], rng, record.mirrorable)
        return {"pixels": view, "present": np.array(True)}

    def before_head(self, params: Any, arrays: Mapping[str, Array], dtype: Any) -> Any:
        """Returns what the stem gives before its head, [B, down, across, channels].

        Args:
          params: of the stem.
          arrays: as the embedder takes them.
          dtype: of the computation.
        """
        pixels = normalised(self.embedding, arrays, dtype)
        return self.embedding.make_stem(dtype=dtype).apply({"params": params}, pixels)

    def read(self, content: bytes) -> dict[str, np.ndarray]:
        pixels = images.decode(content, at_least=self.size, backend=self.decoder)
        return {"pixels": self.whole_view(pixels), "present": np.array(True)}

    def view(
        self, image: Image, rng: np.random.Generator | None, mirrorable: bool
    ) -> UInt8[np.ndarray, "size size 3"]:
        """Returns an image as the model sees it; the evaluation view where `rng` is None.

        Raises:
          OSError: the image cannot be read.
          ValueError: the image cannot be decoded; the message names it.
        """
        if rng is None:
            pixels = images.decode(image, at_least=self.size, backend=self.decoder)
            return self.whole_view(pixels)
        shapes = (self.crop_ratio,) if self.sharp_crops else ()
        at_least = images.least_side(self.size, self.crop_scale, *shapes)
        return images.training_view(
            images.decode(image, at_least=at_least, backend=self.decoder),
            self.size,
            rng,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            mirror=self.mirror and mirrorable,
            resampling=self.resampling,
        )

    def whole_view(
        self, pixels: UInt8[np.ndarray, "height width 3"]
    ) -> UInt8[np.ndarray, "size size 3"]:
        """Returns the evaluation view of a decoded image."""
        return images.evaluation_view(pixels, self.size, resampling=self.resampling, fit=self.fit)

    def absent(self) -> dict[str, np.ndarray]:
        return {
            "pixels": np.zeros((self.size, self.size, 3), np.uint8),
            "present": np.array(False),
        }

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        return ImageEmbedder(self.name, self.embedding, width, dtype)


@dataclass(frozen=True)
class ImageEmbedding:
    """The options of `ImageEmbedder`.

    Attributes:
      grid: patches (down, across) that positions are learned for; others are interpolated.
      patch: pixels on a side.
      stem: 'linear', one dense map of a patch, or 'hierarchical', an MLP of parts within parts; or
        a network that sees the whole picture, by name or `package.module:CLASS` (`STEMS`).
      stem_options: fields that this network has of its own.
      positions: initial values of the learned positions: 'grid', sines of row and column; 'line',
        sines of the index in reading order; 'random'; or 'none' for no positions.
      cut_rest: whether pixels at the right and at the bottom that fill no patch are left out, as a
        convolution does (SigLIP at 384 pixels has patches of 14), and not refused.
      bias: whether the dense map to the model's width has a bias.
      class_token: whether a learned token comes before the patches.
      modality_embedding: whether a learned embedding of the modality is added.
      norm: whether a layer norm follows the sum (CLIP).
      norm_epsilon: of that norm.
      mean, std: of each channel, in 0..1, by which pixels are normalised.
    """

    grid: tuple[int, int]
    patch: int = option(8, least=1)
    stem: str = "linear"
    stem_options: tuple[tuple[str, Any], ...] = ()
    positions: str = option("grid", choices=("grid", "line", "random", "none"))
    cut_rest: bool = False
    bias: bool = True
    class_token: bool = False
    modality_embedding: bool = True
    norm: bool = False
    norm_epsilon: float = 1e-6
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def make_stem(self, **more: Any) -> Any:
        """Returns the network that sees the whole picture.

        Raises:
          ValueError: there is none of this name, or it has no such options.
        """
        try:
            return constructor("modalities.image.stem", self.stem, STEMS, self.stem_options)(**more)
        except ValueError as error:
            if self.stem in STEMS or ":" in self.stem:
                raise
            raise ValueError(f"{error} Of patches alone: {', '.join(PATCHES)}.") from error

    def grid_side(self, size: int, where: str) -> int:
        """Returns the patches on a side of an image of `size` pixels.

        Args:
          size: of the image.
          where: the dotted name of these options, for messages.

        Raises:
          ValueError: the stem does not cut such an image so.
        """
        patch = self.patch
        if self.stem not in PATCHES:
            if (stride := self.make_stem().stride) != patch:
                raise ValueError(
                    f"{where}.{patch=}, but a feature of its stem {self.stem!r} stands for "
                    f"{stride} pixels: set {where}.patch={stride}"
                )
            return -(-size // patch)
        if self.stem_options:
            raise ValueError(f"{where}.stem_options: the stem {self.stem!r} has none")
        if self.stem == "hierarchical" and patch % PART:
            raise ValueError(
                f"{where}.patch={patch}: the hierarchical stem needs a multiple of {PART}"
            )
        if size < patch or (size % patch and not self.cut_rest):
            raise ValueError(
                f"data.image_size={size} is no multiple of {where}.{patch=}: "
                f"{where}.cut_rest leaves out the pixels that fill no patch"
            )
        return size // patch


class ImageEmbedder(nn.Module):
    """Patches through the stem, plus a learned position and the modality's embedding."""

    name_of_group: str
    embedding: ImageEmbedding
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> Tokens:
        """Embeds `pixels`, uint8 or float [B, height, width, 3] in 0..255, and `present` [B].

        In place of pixels, `features` [B, down, across, channels] may be there, what the stem gives
        before its head.
        """
        e = self.embedding
        patches = self.seen(batch)
        rows, down, across, _ = patches.shape
        dense = Dense(
            (self.width,), (None,), ("embed",), use_bias=e.bias, dtype=self.dtype, name="patches"
        )
        x = dense(patches.reshape(rows, down * across, -1))
        vector = partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
        if e.positions != "none":
            start = partitioned(START[e.positions], None, None, "embed")
            table = self.param("positions", start, (*e.grid, self.width))
            positions = resize_positions(table, (down, across)).reshape(down * across, self.width)
            x = x + positions.astype(self.dtype)
        if e.class_token:
            first = self.param("class_token", *vector) + self.param("class_position", *vector)
            first = jnp.broadcast_to(first.astype(self.dtype), (rows, 1, self.width))
            x = jnp.concatenate([first, x], axis=1)
        if e.modality_embedding:
            x = x + self.param("modality", *vector).astype(self.dtype)
        if e.norm:
            x = Norm("layer", e.norm_epsilon, self.dtype, name="norm")(x)
        valid = jnp.broadcast_to(batch["present"][:, None], x.shape[:2])
        grid = int(e.class_token), down, across
        group = Group(
            self.name_of_group, self.name_of_group, x.shape[1], valid_first=True, grid=grid
        )
        coords = patch_centres(down, across)
        if e.class_token:
            coords = np.concatenate([np.zeros((1, 3), np.float32), coords])
        placed = single_document(valid, group, np.zeros(x.shape[1], np.float32), coords)
        return Tokens(blank(x, valid), placed)

    def seen(self, batch: Mapping[str, Array]) -> Float[Array, "B down across values"]:
        """Returns the numbers of each patch, or of the network that sees them all."""
        e = self.embedding
        stem = None if e.stem in PATCHES else e.make_stem(dtype=self.dtype, name="stem")
        if "features" in batch:
            features = blank(batch["features"], batch["present"])
        else:
            pixels = normalised(e, batch, self.dtype)
            features = pixels if stem is None else stem(pixels)
        if stem is not None:
            found: Array = stem.head(features)
            return found
        if e.stem == "linear":
            return patchify(pixels, e.patch)
        # Touvron et al. 2022 ("Three things everyone should know about vision transformers",
        # section 6): no patch sees another, so masked patches do not leak.
        parts = Dense((self.width // 2,), (None,), (None,), dtype=self.dtype, name="parts")
        return patchify(nn.gelu(parts(patchify(pixels, PART))), e.patch // PART)


def normalised(
    embedding: ImageEmbedding, batch: Mapping[str, Array], dtype: Any
) -> Float[Array, "B height width 3"]:
    """Returns the pixels of a batch with the mean and the deviation that an embedding asks for."""
    e = embedding
    pixels = blank(batch["pixels"].astype(jnp.float32), batch["present"])
    if e.cut_rest:
        height, width = (side // e.patch * e.patch for side in pixels.shape[1:3])
        pixels = pixels[:, :height, :width]
    mean, std = (255.0 * jnp.array(value) for value in (e.mean, e.std))
    return ((pixels - mean) / std).astype(dtype)


def patchify(
    pixels: Float[Array, "B height width channels"], patch: int
) -> Float[Array, "B down across values"]:
    """Cuts images into squares of patch * patch * channels values, row by row, channels last.

    Raises:
      ValueError: the height or the width is no multiple of `patch`.
    """
    batch, height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"a picture of {height}x{width} pixels is not cut evenly by {patch}")
    x = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)


def resize_positions(
    table: Float[Array, "down across D"], grid: tuple[int, int]
) -> Float[Array, "down2 across2 D"]:
    """Interpolates learned positions bilinearly for another number of patches."""
    if table.shape[:2] == grid:
        return table
    return jax.image.resize(table, (*grid, table.shape[-1]), "bilinear")


def _sines(count: int, width: int) -> Float[Array, "count width"]:
    """Returns sines and cosines of each index, with rates that fall from 1 to 1/100."""
    rates = 1.0 / 100.0 ** jnp.linspace(0.0, 1.0, width // 2)
    angles = jnp.arange(count, dtype=jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _grid_positions(key: Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """Returns initial positions: half of the width are sines of the row, half of the column."""
    del key
    down, across, width = shape
    if width % 4:
        raise ValueError(f"the model's width {width} must be a multiple of 4")
    rows = jnp.broadcast_to(_sines(down, width // 2)[:, None], (down, across, width // 2))
    columns = jnp.broadcast_to(_sines(across, width // 2)[None], rows.shape)
    return jnp.concatenate([rows, columns], axis=-1).astype(dtype)


def _line_positions(key: Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> Array:
    """Returns initial positions: sines of the reading order (Vaswani et al. 2017, section 3.5)."""
    del key
    down, across, width = shape
    if width % 2:
        raise ValueError(f"the model's width {width} must be even")
    return _sines(down * across, width).reshape(shape).astype(dtype)


START = {
    "grid": _grid_positions,
    "line": _line_positions,
    "random": nn.initializers.normal(0.5**0.5),  # as large as the sines, so only order differs
}
