"""Contribution of a modality: what a trained model loses when the modality is taken away.

There are three ways to take it away. `dropped`: it is absent, as where the data has none;
`blanked`: it is present and says nothing (a black picture); `shuffled`: it is another example's,
so that the input is as usual and only the pairing is wrong (permutation importance: Breiman 2001,
section 10). The first two may be unlike anything that the model was trained on, and then they
cost more than the information in the modality; shuffling measures that information.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from unified_mm.analysis.captions import cider_d
from unified_mm.analysis.intervals import Mean, mean_interval
from unified_mm.data.pipeline import Arrays, Preparer
from unified_mm.data.records import Record, Text
from unified_mm.evaluation.evaluate import captions_of
from unified_mm.inference.predictor import Predictor
from unified_mm.objectives.captioning import Captioning

WHOLE = "whole"


@dataclass(frozen=True)
class Altered:
    """A modality that is prepared in another way.

    Attributes:
      prepare: returns the arrays of an example.
      absent: returns those of an example that lacks the modality.
    """

    prepare: Callable[[Any, np.random.Generator | None], Arrays]
    absent: Callable[[], Arrays]


@dataclass(frozen=True)
class Contribution:
    """The scores of a model with a modality taken away in one way.

    Attributes:
      nats: negative log-likelihood of the captions in nats per token, mean over captions.
      cider_d: CIDEr-D of the greedy captions in [0, 10], mean over images.
      nats_lost, cider_d_lost: paired differences from the scores with every modality; positive is
        worse.
    """

    nats: Mean
    cider_d: Mean
    nats_lost: Mean
    cider_d_lost: Mean


def contribution(
    predictor: Predictor, records: Sequence[Record], modality: str, *, batch_size: int
) -> dict[str, Contribution]:
    """Scores a model's captions with every modality, and with one taken away.

    Args:
      predictor: the model.
      records: records with captions; the likelihood is that of the first caption of each.
      modality: name of a context modality, such as 'image'.
      batch_size: examples in a batch.

    Returns:
      By way: 'whole' (nothing is taken away), 'dropped', 'blanked', 'shuffled'.

    Raises:
      ValueError: the model writes no text or does not read the modality, or there are fewer than
        two records.
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
    scores = {
        way: _scores(predictor, rows, preparers, references, batch_size)
        for way, preparers in taken_away(task.modalities, modality, rows).items()
    }
    whole_nats, whole_cider = scores[WHOLE]
    return {
        way: Contribution(
            mean_interval(nats),
            mean_interval(cider),
            mean_interval(nats - whole_nats),
            mean_interval(whole_cider - cider),
        )
        for way, (nats, cider) in scores.items()
    }


def taken_away(
    preparers: Mapping[str, Preparer], modality: str, records: Sequence[Record]
) -> dict[str, dict[str, Preparer]]:
    """Returns the preparers as they are, and with each way of taking a modality away.

    When shuffled, each record gets the modality of the record half the list further on.
    """
    half = max(1, len(records) // 2)
    moved = [*records[half:], *records[:half]]
    others = {record.id: other for record, other in zip(records, moved, strict=True)}
    own = preparers[modality]

    def dropped(record: Any, rng: np.random.Generator | None) -> Arrays:
        return own.absent()

    def blanked(record: Any, rng: np.random.Generator | None) -> Arrays:
        return {**own.absent(), "present": own.prepare(record, rng)["present"]}

    def shuffled(record: Any, rng: np.random.Generator | None) -> Arrays:
        return own.prepare(others[record.id], rng)

    ways = {WHOLE: own.prepare, "dropped": dropped, "blanked": blanked, "shuffled": shuffled}
    return {
        way: {**preparers, modality: Altered(prepare, own.absent)} for way, prepare in ways.items()
    }


def _scores(
    predictor: Predictor,
    rows: Sequence[Record],
    preparers: Mapping[str, Preparer],
    references: Sequence[Sequence[str]],
    batch_size: int,
) -> tuple[Float[np.ndarray, " images"], Float[np.ndarray, " images"]]:
    """Returns each caption's nats per token, and the CIDEr-D of what is written about its image."""

    def both(batch: Any) -> Any:
        written = predictor.write(batch, [""] * batch_size)
        return zip(predictor.log_likelihood(batch), written, strict=True)

    found = predictor.over(rows, batch_size, both, preparers)
    scored = np.array([likelihood for likelihood, _ in found], np.float64)
    return -scored[:, 0] / scored[:, 1], cider_d([text for _, text in found], references)
