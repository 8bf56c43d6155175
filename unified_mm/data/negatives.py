"""Negative examples for recognisers: what is made of silence and noise, with an empty text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.data.records import Record, Text


def negatives(modalities: Mapping[str, Any], count: int, first: int = 0) -> tuple[Record, ...]:
    """Returns so many examples, the kinds that the modality can make (`made`) in turn.

    Training draws what they hold by its seed and the number of the sample, evaluation by the
    example's own number.

    Args:
      modalities: of the model, by name.
      count: of examples.
      first: number of the first one.

    Raises:
      ValueError: no modality can make any.
    """
    able = next((name for name, each in modalities.items() if hasattr(each, "made")), None)
    if able is None:
        raise ValueError(
            f"negatives are made of sounds, and the model reads {', '.join(modalities)}: set "
            "data.negatives and evaluation.negatives to 0"
        )
    kinds = modalities[able].made
    return tuple(
        Record(
            f"{kinds[number % len(kinds)]} {number}",
            {able: {"made": kinds[number % len(kinds)], "seed": number}},
            (Text("", ""),),
            False,
        )
        for number in range(first, first + count)
    )


def kind_of(record: Record) -> str:
    """Returns what a negative example is of."""
    return str(record.id).partition(" ")[0]
