"""Interleaved documents as arrays of images and of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unified_mm.data.interleave import NO_DOCUMENT, Layout, PlacedImage, PlacedToken, Row
from unified_mm.data.pipeline import Arrays, Preparer
from unified_mm.modalities.image import ImageModality
from unified_mm.modalities.text import TextModality


@dataclass(frozen=True)
class InterleavedImages:
    """Prepares the images of rows, in `layout.slots` slots (S) of the modality's size.

    The text modality is there because where texts are cut, so are the images after them.
    """

    modality: ImageModality
    text: TextModality
    layout: Layout

    def prepare(self, row: Row, rng: np.random.Generator | None) -> Arrays:
        """`pixels` uint8 [S, size, size, 3], `present` bool [S], and int32 [S] each of
        `position`, `segment` and `document` (see `Layout`); unused slots hold zeros, document -1.
        """
        images, _ = self.layout.fill(row, self.text.tokenizer)
        arrays = self._arrays(images)
        for slot, image in enumerate(images):
            arrays["pixels"][slot] = self.modality.view(image.path, rng, row.mirrorable)
        return arrays

    def absent(self) -> Arrays:
        return self._arrays([])

    def _arrays(self, images: Sequence[PlacedImage]) -> Arrays:
        """All arrays, the pixels black."""
        slots, size = self.layout.slots, self.modality.size
        return {
            "pixels": np.zeros((slots, size, size, 3), np.uint8),
            "present": np.arange(slots) < len(images),
            **_where(images, slots),
        }


@dataclass(frozen=True)
class InterleavedText:
    """Prepares the texts of rows, in `layout.length` tokens (T)."""

    modality: TextModality
    layout: Layout

    def prepare(self, row: Row, rng: np.random.Generator | None) -> Arrays:
        """`ids` int32 [T], `valid` and `scored` bool [T], `prompted` (False) and `present` bool
        [], and int32 [T] each of `place`, `position`, `segment` and `document` (see `Layout`);
        unused tokens hold zeros, document -1. Nothing is drawn.
        """
        _, tokens = self.layout.fill(row, self.modality.tokenizer)
        return self._arrays(tokens, present=True)

    def absent(self) -> Arrays:
        return self._arrays([], present=False)

    def _arrays(self, tokens: Sequence[PlacedToken], present: bool) -> Arrays:
        length = self.layout.length
        return {
            "ids": _column([token.id for token in tokens], length),
            "valid": np.arange(length) < len(tokens),
            "scored": _column([token.scored for token in tokens], length).astype(bool),
            "text_position": _column([token.place for token in tokens], length),
            **_where(tokens, length),
            "prompted": np.array(False),
            "present": np.array(present),
        }


def interleaved_preparers(
    modalities: Mapping[str, Any], slots: int, length: int
) -> dict[str, Preparer]:
    """What `training_batches` and `evaluation_batches` need to read `Row`s.

    Raises ValueError for other modalities than 'image' and 'text', and where a row is to hold
    less than an image and a token.
    """
    kinds = {name: type(modality) for name, modality in modalities.items()}
    if kinds != {"image": ImageModality, "text": TextModality}:
        found = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ValueError(
            "interleaved documents hold images and texts: model.modalities must be 'image' and "
            f"'text' of those types, is {found or 'empty'}"
        )
    layout = Layout(slots, length)
    image = InterleavedImages(modalities["image"], modalities["text"], layout)
    text = InterleavedText(modalities["text"], layout)
    return {"image": image, "text": text}


def _where(items: Sequence[PlacedImage] | Sequence[PlacedToken], length: int) -> Arrays:
    """What both kinds are told by to attention rules: int32 [length] each."""
    return {
        "position": _column([item.position for item in items], length),
        "segment": _column([item.segment for item in items], length),
        "document": _column([item.document for item in items], length, unused=NO_DOCUMENT),
    }


def _column(values: Sequence[int], length: int, unused: int = 0) -> np.ndarray:
    """int32 [length]: the values, then `unused`."""
    column = np.full(length, unused, np.int32)
    column[: len(values)] = values
    return column
