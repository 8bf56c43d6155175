"""What a modality contributes: it is taken away from a trained model, and the loss is looked at.

Three ways to take it away. `dropped`: it is absent, as where the data has none; `blanked`: it is
there and says nothing (a black picture); `shuffled`: it is another example's, so that the input
is as usual and only the pairing is wrong (permutation importance: Breiman 2001, section 10).
The first two may look like nothing that the model was trained on, and then they cost more than
what the modality tells; shuffling asks what its content tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from unified_mm.analysis.intervals import Mean, mean_interval
from unified_mm.data.pipeline import Arrays, Preparer, evaluation_batches
from unified_mm.data.records import Record, Text
from unified_mm.evaluation.caption_scores import cider_d_per_image, tokenize
from unified_mm.evaluation.evaluate import captions_of
from unified_mm.inference.predictor import Predictor
from unified_mm.objectives.captioning import Captioning

WHOLE = "whole"


@dataclass(frozen=True)
class Dropped:
    """A modality that no example has."""

    preparer: Preparer

    def prepare(self, record: Any, rng: np.random.Generator | None) -> Arrays:
        return self.preparer.absent()

    def absent(self) -> Arrays:
        return self.preparer.absent()


@dataclass(frozen=True)
class Blanked:
    """A modality that is there where it was, and is zero: a black picture."""

    preparer: Preparer

    def prepare(self, record: Any, rng: np.random.Generator | None) -> Arrays:
        present = self.preparer.prepare(record, rng)["present"]
        return {**self.preparer.absent(), "present": present}

    def absent(self) -> Arrays:
        return self.preparer.absent()


@dataclass(frozen=True)
class Shuffled:
    """Each example with the modality of another.

    Attributes:
      others: by id of a record, the one whose modality it gets.
    """

    preparer: Preparer
    others: Mapping[int | str, Record]

    def prepare(self, record: Any, rng: np.random.Generator | None) -> Arrays:
        return self.preparer.prepare(self.others[record.id], rng)

    def absent(self) -> Arrays:
        return self.preparer.absent()


@dataclass(frozen=True)
class Contribution:
    """How a model does with a modality taken away in one way.

    Attributes:
      nats: negative log-likelihood of the captions, nats a token, the mean over captions.
      cider_d: of the greedy captions, in [0, 10], the mean over images.
      nats_lost, cider_d_lost: what is worse than with everything there, pair by pair.
    """

    nats: Mean
    cider_d: Mean
    nats_lost: Mean
    cider_d_lost: Mean


def contribution(
    predictor: Predictor, records: Sequence[Record], modality: str, *, batch_size: int
) -> dict[str, Contribution]:
    """A model's captions with everything there ('whole') and with a modality taken away.

    Args:
      records: that have captions; the first one of each is what is scored.
      modality: the name of a context modality, 'image'.

    Returns:
      By way: 'whole', 'dropped', 'blanked', 'shuffled'.

    Raises:
      ValueError: a model that writes nothing or does not read the modality, or fewer than two
        records.
    """
    task = predictor.task
    if not predictor.can(Captioning):
        raise ValueError(
            "this model writes no text, and what a modality contributes is measured by the text's "
            "loss: " + ", ".join(objective.name for objective in task.objectives)
        )
    if modality not in task.model.context_names:
        raise ValueError(
            f"modality {modality!r}: this model reads text beside "
            f"{', '.join(task.model.context_names) or 'nothing'}"
        )
    if len(records) < 2:
        raise ValueError("give two images with captions or more: CIDEr-D compares images")
    references = [captions_of(record) for record in records]
    rows = [
        replace(record, texts=(Text("", texts[0]),))
        for record, texts in zip(records, references, strict=True)
    ]
    nats, cider = {}, {}
    for way, preparers in taken_away(task.modalities, modality, rows).items():
        nats[way] = _nats(predictor, rows, preparers, batch_size)
        cider[way] = _cider_d(predictor, rows, preparers, batch_size, references)
    return {
        way: Contribution(
            mean_interval(nats[way]),
            mean_interval(cider[way]),
            mean_interval(nats[way] - nats[WHOLE]),
            mean_interval(cider[WHOLE] - cider[way]),
        )
        for way in nats
    }


def taken_away(
    preparers: Mapping[str, Preparer], modality: str, records: Sequence[Record]
) -> dict[str, dict[str, Preparer]]:
    """The preparers as they are, and with each way of taking a modality away.

    Shuffled, each record has that of the one half the list further on.
    """
    half = max(1, len(records) // 2)
    moved = [*records[half:], *records[:half]]
    others = {record.id: other for record, other in zip(records, moved, strict=True)}
    own = preparers[modality]
    ways: dict[str, Preparer] = {
        WHOLE: own,
        "dropped": Dropped(own),
        "blanked": Blanked(own),
        "shuffled": Shuffled(own, others),
    }
    return {way: {**preparers, modality: preparer} for way, preparer in ways.items()}


def _nats(
    predictor: Predictor,
    rows: Sequence[Record],
    preparers: Mapping[str, Preparer],
    batch_size: int,
) -> Float[np.ndarray, " I"]:
    """Nats a token of each caption."""
    parts = [predictor.log_likelihood(b) for b in _batches(predictor, rows, preparers, batch_size)]
    scored = np.concatenate(parts)[: len(rows)].astype(np.float64)
    return -scored[:, 0] / scored[:, 1]


def _cider_d(
    predictor: Predictor,
    rows: Sequence[Record],
    preparers: Mapping[str, Preparer],
    batch_size: int,
    references: Sequence[Sequence[str]],
) -> Float[np.ndarray, " I"]:
    """CIDEr-D of what is written about each image."""
    written: list[str] = []
    for batch in _batches(predictor, rows, preparers, batch_size):
        written += predictor.write(batch, [""] * batch_size)
    return cider_d_per_image(
        [tokenize(text) for text in written[: len(rows)]],
        [[tokenize(text) for text in texts] for texts in references],
    )


def _batches(
    predictor: Predictor,
    rows: Sequence[Record],
    preparers: Mapping[str, Preparer],
    batch_size: int,
) -> Iterator[Any]:
    batches = evaluation_batches(
        rows, preparers, batch_size=batch_size, rows=predictor.rows(batch_size)
    )
    with closing(batches):  # type: ignore[type-var]
        yield from batches
