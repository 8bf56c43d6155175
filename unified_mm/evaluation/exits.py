"""What leaving layers early costs: how often the model with all layers would write another token.

Texts are written as they will be, each token after the words that the model with exits wrote. The
loss of a text is the share of its tokens that all layers, after the same words, would not choose.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from unified_mm.data.records import Record
from unified_mm.evaluation.evaluate import Split
from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.predictor import ANSWER, CAPTION, Predictor, inputs_of
from unified_mm.models.unified import UnifiedModel
from unified_mm.objectives.captioning import score_text


@dataclass(frozen=True)
class EarlyTexts:
    """What was measured on texts, an example each.

    Attributes:
      losses: share of the tokens that the model with all layers would not have written.
      tokens: how many each has.
      left: by exit the share of tokens that had left after it, of the tokens that may leave: the
        first of a text is written after its prompt was read, by all layers.
      depth: mean share of the layers that these tokens went through.
    """

    losses: Float[np.ndarray, " examples"]
    tokens: Float[np.ndarray, " examples"]
    left: tuple[float, ...]
    depth: float


def texts_of(split: Split) -> dict[str, tuple[Sequence[Record], Sequence[str]]]:
    """Returns by kind what texts are written about, with their prompts; kinds without are left out.

    There is one caption an image, and one answer an image, so that examples are independent.
    """
    first = {record.id: (record, question.question) for record, question in reversed(split.asked)}
    found = {CAPTION: [(record, "") for record in split.captioned], ANSWER: list(first.values())}
    return {
        kind: ([record for record, _ in rows], [prompt for _, prompt in rows])
        for kind, rows in found.items()
        if rows
    }


def early_texts(
    predictor: Predictor, records: Sequence[Record], prompts: Sequence[str], batch_size: int
) -> EarlyTexts:
    """Writes a text about each record, leaving layers early, and holds it against all layers."""
    asked = itertools.chain(prompts, itertools.repeat(prompts[0]))
    rows = predictor.over(
        records,
        batch_size,
        lambda batch: compared(predictor, batch, list(itertools.islice(asked, batch_size))),
    )
    tokens, equal, *gone = np.array(rows, np.float64).T
    late = max(float((tokens - 1).sum()), 1.0)
    left = tuple(float(each.sum()) / late for each in gone)
    o = predictor.task.model.options
    skipped = np.dot(left, np.diff((*o.exits, o.layers)))
    return EarlyTexts(1 - equal / tokens, tokens, left, 1 - float(skipped) / o.layers)


def compared(
    predictor: Predictor, batch: Any, prompts: Sequence[str]
) -> Float[np.ndarray, "B numbers"]:
    """Returns of each text its tokens, those that all layers would choose, and by exit those left.

    These had left after it, of all tokens but the first.
    """
    length = predictor.task.modalities["text"].length
    writer = predictor.writer(length - 1)
    text, used = predictor.prompts(prompts)
    ends = GREEDY.stop_ids(predictor.task.tokenizer)
    threshold = predictor.thresholds(prompts, GREEDY)
    inputs = inputs_of(GREEDY, {**batch, "text": text}, length - used, ends, 0, threshold)

    def write(params: Any, inputs: Any) -> Any:
        state = writer.generate(params, writer.begin(params, inputs))
        early = state.read_state.early
        assert early is not None
        return state.written, state.count, early.left

    written, count, left = map(
        np.asarray, predictor.call("write early", write, predictor.to_device(inputs))
    )
    place = np.arange(length)
    there = place < (used + count)[:, None]
    of_text = there & (place >= used[:, None])
    ids = np.full(there.shape, predictor.task.tokenizer.pad_id, np.int32)
    ids[place < used[:, None]] = text["ids"][text["valid"]]
    ids[of_text] = written[np.arange(written.shape[1]) < count[:, None]]
    whole = {"ids": ids, "valid": there, "scored": of_text, "present": np.ones(len(ids), bool)}

    def score(params: Any, batch: Any) -> Any:
        def read(model: UnifiedModel) -> Any:
            x = model.encode(batch, (writer.view,))[writer.view.name].text
            _, right, scored = score_text(model.logits, x, batch["text"])
            return (right & scored).sum(1)

        return writer.model.apply({"params": params}, method=read)

    read = predictor.to_device({**batch, "text": whole})
    equal = np.asarray(predictor.call("agree", score, read))
    return np.concatenate([np.stack([count, equal], axis=1), left], axis=1)
