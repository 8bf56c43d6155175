"""The interface of a modality: data of one example on the host, an embedder on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import numpy as np

from unified_mm.data.records import Record
from unified_mm.registry import resolve

BUILT_IN = {
    "audio": "unified_mm.modalities.audio:AudioModality",
    "image": "unified_mm.modalities.image:ImageModality",
    "points": "unified_mm.modalities.points:PointsModality",
    "text": "unified_mm.modalities.text:TextModality",
    "video": "unified_mm.modalities.video:VideoModality",
}


@runtime_checkable
class Modality(Protocol):
    """One way of turning raw data into tokens.

    A modality is an immutable, hashable value (a frozen dataclass): it describes shapes and holds
    no arrays. `batch[name]` is what `prepare` returns, stacked over examples; it always has the
    key `present` (bool).

    What it reads of a record is `record.parts[name]`, or the record's texts. It may have a method
    `fault(part) -> str` that returns what is wrong with such a part, '' for a good one: examples
    with a bad one are then named, counted and left out before training.

    It may have `from_data`, names of options that are taken from the training data where the first
    of them is empty or 0, with a method `measure(records)` that returns them by name; and
    `windows(part)`, the parts of a long item that evaluation reads one by one and averages, beside
    `read_windows(item)`, what `read` returns of windows of such a part or of what a file holds,
    over which embeddings are averaged. In place of them there may be `longer(part)`: whether
    evaluation takes the middle of an item alone.
    With `steps`, its tokens are of so many moments, the same number each and the earliest first.

    Where it can be transcribed, it may have `tokens_per_step`, its tokens of each step in time;
    `steps_of(part)`, the steps of a part, so that what is too short for its text is named; and
    `whole`, whether every part is read from its beginning to its end. `made` names what it can make
    of which no text tells: it prepares a part `{"made": NAME, "seed": NUMBER}`.

    Attributes:
      name: its key under `config.model.modalities`.
      suffixes: what the names of its files end with, in lower case, such as '.wav'. With `read` it
        is owed by a modality whose items lie in files: those that are indexed, classified or sent
        to a server. Text has neither, for a text is given as it is.
    """

    name: str
    suffixes: Collection[str]

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> Modality:
        """Returns the modality of `config.model.modalities.<name>`; `resources` are `Resources`."""

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns the arrays of one example; `rng` draws augmentations, None is for evaluation."""

    def absent(self) -> dict[str, np.ndarray]:
        """Returns arrays of the same keys and shapes for an example that lacks this modality."""

    def read(self, content: bytes) -> dict[str, np.ndarray]:
        """Returns the arrays of the one item that a file holds, as `prepare` does for evaluation.

        The file may be anybody's upload: what would take too much memory or time is refused.

        Raises:
          ValueError: what is wrong with it, without its name.
        """

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        """Returns a module, `batch[name] -> Tokens` with one group of the modality's name."""


def build_modalities(options: Mapping[str, Mapping[str, Any]], resources: Any) -> dict[str, Any]:
    """Returns the modalities of a config, by name, in the order of the sequence: text comes last.

    Args:
      options: `config.model.modalities`: name -> options, with `type` naming the class (a built-in
        name or `package.module:attribute`).
      resources: what modalities share (`Resources`: the data options and the tokenizer).

    Raises:
      ValueError: a type is unknown, or there is no modality.
    """
    if not options:
        raise ValueError("model.modalities holds none: there is nothing to read")
    ordered = sorted(options, key=lambda name: name == "text")
    return {
        name: resolve("modality", options[name]["type"], BUILT_IN).from_config(
            name, options[name], resources
        )
        for name in ordered
    }
