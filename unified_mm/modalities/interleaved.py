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
    """The preparer of the images of a row, in I = `layout.slots` slots of the modality's size.

    It needs the text modality because where a text is cut, so are the images after it.
    """

    modality: ImageModality
    text: TextModality
    layout: Layout

    def prepare(self, row: Row, rng: np.random.Generator | None) -> Arrays:
        """Returns the arrays of a row's images.

        Returns:
          `pixels` uint8 [I, size, size, 3], `present` bool [I], and int32 [I] each of `position`,
          `segment` and `document` (see `PlacedImage`); unused slots hold zeros, document -1.
        """
        images, _ = self.layout.fill(row, self.text.tokenizer)
        arrays = self._arrays(images)
        for slot, image in enumerate(images):
            arrays["pixels"][slot] = self.modality.view(image.path, rng, row.mirrorable)
        return arrays

    def absent(self) -> Arrays:
        return self._arrays([])

    def _arrays(self, images: Sequence[PlacedImage]) -> Arrays:
        """Returns all arrays, with black pixels."""
        slots, size = self.layout.slots, self.modality.size
        return {
            "pixels": np.zeros((slots, size, size, 3), np.uint8),
            "present": np.arange(slots) < len(images),
            **_where(images, slots),
        }


@dataclass(frozen=True)
class InterleavedText:
    """The preparer of the texts of a row, in T = `layout.length` tokens."""

    modality: TextModality
    layout: Layout

    def prepare(self, row: Row, rng: np.random.Generator | None) -> Arrays:
        """Returns the arrays of a row's texts; nothing is drawn.

        Returns:
          `ids` int32 [T], `valid` and `scored` bool [T], `prompted` (False) and `present` bool [],
          and int32 [T] each of `text_position`, `position`, `segment` and `document` (see
          `PlacedToken`); unused tokens hold zeros, document -1.
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
    """Returns the preparers of `Row`s for `training_batches` and `evaluation_batches`.

    Args:
      modalities: by name.
      slots: images in a row.
      length: text tokens in a row.

    Raises:
      ValueError: the modalities are not 'image' and 'text' of the built-in types, or `slots` or
        `length` is below 1.
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
    """Returns the metadata that attention rules use, int32 [length] each."""
    return {
        "position": _column([item.position for item in items], length),
        "segment": _column([item.segment for item in items], length),
        "document": _column([item.document for item in items], length, unused=NO_DOCUMENT),
    }


def _column(values: Sequence[int], length: int, unused: int = 0) -> np.ndarray:
    """Returns the values as int32 [length], filled up with `unused`."""
    column = np.full(length, unused, np.int32)
    column[: len(values)] = values
    return column
