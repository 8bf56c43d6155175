"""Negative examples for recognisers: silence, noise and other sounds, with an empty text."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from typing import Any

from unified_mm.data.records import Record, Text
from unified_mm.data.sounds import seconds_of

FROM_FILES = "sounds"  # the kind of what files hold


def negatives(modalities: Mapping[str, Any], count: int, pattern: str = "") -> tuple[Record, ...]:
    """Returns so many examples, of each kind in turn.

    Training draws what they hold by its seed and the number of the sample, evaluation by the
    example's own number.

    Args:
      modalities: of the model, by name. One of them says which kinds it can make (`made`).
      count: of examples.
      pattern: of the names of files (`glob`, with ** for any folders) of which parts are one more
        kind, the files in turn by name.

    Raises:
      ValueError: no modality can make any, or the pattern names no file, or one that is no sound.
    """
    able = next((name for name, each in modalities.items() if hasattr(each, "made")), None)
    if able is None:
        raise ValueError(
            f"negatives are made of sounds, and the model reads {', '.join(modalities)}: set "
            "data.negatives and evaluation.negatives to 0"
        )
    files = files_of(pattern, modalities[able]) if pattern else []
    kinds = (*modalities[able].made, *([FROM_FILES] if files else []))

    def part(number: int) -> dict[str, Any]:
        made = {"made": kinds[number % len(kinds)], "seed": number}
        if made["made"] == FROM_FILES:
            made["file"] = files[number // len(kinds) % len(files)]
        return made

    return tuple(
        Record(
            f"{kinds[number % len(kinds)]} {number}", {able: part(number)}, (Text("", ""),), False
        )
        for number in range(count)
    )


def files_of(pattern: str, modality: Any) -> list[str]:
    """Returns the files of a pattern that a modality reads by their suffix, in order.

    Raises:
      ValueError: there is none, or the header of one cannot be read.
    """
    found = sorted(
        file
        for file in glob.glob(os.path.expanduser(pattern), recursive=True)
        if file.lower().endswith(tuple(modality.suffixes))
    )
    if not found:
        raise ValueError(
            f"negatives_of={pattern!r}: names no file of {', '.join(sorted(modality.suffixes))}"
        )
    for file in found:
        seconds_of(file)
    return found


def kind_of(record: Record) -> str:
    """Returns what a negative example is of."""
    return str(record.id).partition(" ")[0]
