"""Interleaved documents as arrays of each modality and of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unified_mm.data.interleave import NO_DOCUMENT, Layout, PlacedItem, PlacedToken, Row
from unified_mm.data.pipeline import Arrays, Preparer
from unified_mm.data.records import Record
from unified_mm.modalities.text import TextModality


@dataclass(frozen=True)
class InterleavedItems:
    """The preparer of a modality's items of a row, in I = `layout.slots` slots.

    It needs the text modality because where a text is cut, so are the items after it.
    """

    modality: Any
    text: TextModality
    layout: Layout

    def prepare(self, row: Row, rng: np.random.Generator | None) -> Arrays:
        """Returns the arrays of a row's items.

        Returns:
          What the modality prepares, with a leading axis I (`pixels` uint8 [I, size, size, 3] and
          `present` bool [I] of images), and int32 [I] each of `position`, `segment` and `document`
          (see `PlacedItem`); unused slots hold what is absent, document -1.
        """
        items, _ = self.layout.fill(row, self.text.tokenizer)
        return self._arrays(items.get(self.modality.name, []), rng, row.mirrorable)

    def absent(self) -> Arrays:
        return self._arrays([], None, False)

    def _arrays(
        self, items: Sequence[PlacedItem], rng: np.random.Generator | None, mirrorable: bool
    ) -> Arrays:
        slots, name = self.layout.slots, self.modality.name
        records = [Record("", {name: item.part}, (), mirrorable) for item in items]
        prepared = [self.modality.prepare(record, rng) for record in records]
        prepared += [self.modality.absent()] * (slots - len(items))
        arrays = {key: np.stack([each[key] for each in prepared]) for key in prepared[0]}
        return arrays | _where(items, slots)


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
      slots: items of each modality in a row.
      length: text tokens in a row.

    Raises:
      ValueError: there is no 'text' of the built-in type beside other modalities, or `slots` or
        `length` is below 1.
    """
    text = modalities.get("text")
    if not isinstance(text, TextModality) or len(modalities) < 2:
        found = ", ".join(f"{name} ({type(each).__name__})" for name, each in modalities.items())
        raise ValueError(
            "interleaved documents hold texts and what stands between them: model.modalities must "
            f"have 'text' of the built-in type and another one, is {found or 'empty'}"
        )
    layout = Layout(slots, length)
    return {
        name: InterleavedText(text, layout)
        if name == "text"
        else InterleavedItems(modality, text, layout)
        for name, modality in modalities.items()
    }


def _where(items: Sequence[PlacedItem] | Sequence[PlacedToken], length: int) -> Arrays:
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
