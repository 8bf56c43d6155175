"""Few-shot scores: examples from the training data precede the image that the model writes about.

Alayrac et al. 2022 (Flamingo), section 3.4 and appendix A.2: a document of k images with their
texts, then one more image, whose text the model writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unified_mm.data.coco import Question
from unified_mm.data.documents import Document, Item, Part
from unified_mm.data.interleave import Row, text_length
from unified_mm.data.records import Record, Text
from unified_mm.evaluation import answers
from unified_mm.evaluation.caption_scores import caption_scores
from unified_mm.inference.predictor import Predictor
from unified_mm.modalities.interleaved import interleaved_preparers
from unified_mm.modalities.text import TextModality

_TOKENS_TOGETHER = 32  # rows are as long as a multiple of this, so that few shapes are compiled


@dataclass(frozen=True)
class FewShot:
    """The settings of few-shot scoring.

    Attributes:
      shots: numbers of examples, each scored on its own.
      support: training records from which the examples are drawn.
      images: number of images of the split that are scored, from the first.
      questions: number of questions about these images that are scored, from the first.
      seed: seed of the draws.
    """

    shots: tuple[int, ...] = ()
    support: Sequence[Record] = ()
    images: int = 0
    questions: int = 0
    seed: int = 0


def few_shot_scores(
    predictor: Predictor,
    records: Sequence[Record],
    questions: Sequence[Question],
    options: FewShot,
    batch_size: int,
) -> dict[str, float]:
    """Returns the scores of captions and answers for each number of shots.

    Returns:
      `few_shot/<shots>/caption/...` where there are captions, and `few_shot/<shots>/answer/...`
      where there are questions.

    Raises:
      ValueError: as `prompt_rows` does.
    """
    captioned, asked = what_is_asked(records, questions, options)
    scores: dict[str, float] = {}
    for shots in options.shots:
        if captioned:
            pairs = [(record, "") for record in captioned]
            written = write_after_shots(predictor, pairs, shots, options, batch_size)
            references = [[t.target for t in record.texts if not t.prompt] for record in captioned]
            found = caption_scores(written, references)
            scores |= {f"few_shot/{shots}/caption/{name}": value for name, value in found.items()}
        if asked:
            pairs = [(record, question.question) for record, question in asked]
            written = write_after_shots(predictor, pairs, shots, options, batch_size)
            found = answers.answer_scores(written, [question for _, question in asked])
            scores |= {f"few_shot/{shots}/{name}": value for name, value in found.items()}
    return scores


def what_is_asked(
    records: Sequence[Record], questions: Sequence[Question], options: FewShot
) -> tuple[list[Record], list[tuple[Record, Question]]]:
    """Returns the records that captions are written for, and the questions that are answered."""
    chosen = [record for record in records if record.image][: options.images]
    by_id = {record.id: record for record in chosen}
    asked = [(by_id[each.image_id], each) for each in questions if each.image_id in by_id]
    captioned = [record for record in chosen if record.has("text")]
    return captioned, asked[: options.questions]


def check_few_shot(
    text: TextModality, records: Sequence[Record], questions: Sequence[Question], options: FewShot
) -> None:
    """Checks, before a run is trained, that every document leaves room for what is written.

    Raises:
      ValueError: one does not, or `prompt_row` refuses it.
    """
    captioned, asked = what_is_asked(records, questions, options)
    captions = [(record, "") for record in captioned]
    answered = [(record, question.question) for record, question in asked]
    for shots in options.shots:
        for pairs in filter(None, (captions, answered)):
            prompt_rows(text, pairs, shots, options)


def prompt_rows(
    text: TextModality, asked: Sequence[tuple[Record, str]], shots: int, options: FewShot
) -> tuple[list[Row], int]:
    """Returns a document for each image and its prompt, and the most text tokens of any.

    The examples are questions with answers where the prompt is a question, else captions.

    Raises:
      ValueError: a document has as many tokens as the model has learned positions, or more, or
        there are fewer examples than shots.
    """
    kinds = {bool(prompt) for _, prompt in asked}
    examples = {prompted: examples_of(options.support, prompted) for prompted in kinds}
    rows = [
        prompt_row(number, record, prompt, examples[bool(prompt)], shots, options.seed)
        for number, (record, prompt) in enumerate(asked)
    ]
    longest = max(text_length(row.documents[0], text.tokenizer) for row in rows)
    given = longest - 1  # without the end of the text that is to be written
    embedding = text.embedding
    if embedding.learned_positions and given >= embedding.max_positions:
        raise ValueError(
            f"evaluation.shots={shots}: a document of {shots} examples and a prompt has {given} "
            f"text tokens, and the model has learned {embedding.max_positions} positions: no room "
            f"is left for its answer. Ask for fewer shots, or train with model.modalities."
            f"{text.name}.max_positions={given + text.length}"
        )
    return rows, longest


def write_after_shots(
    predictor: Predictor,
    asked: Sequence[tuple[Record, str]],
    shots: int,
    options: FewShot,
    batch_size: int,
) -> list[str]:
    """Returns what the model writes about each image after its prompt, given `shots` examples.

    Raises:
      ValueError: as `prompt_rows` does.
    """
    text = predictor.task.modalities["text"]
    rows, longest = prompt_rows(text, asked, shots, options)
    length = -(-longest // _TOKENS_TOGETHER) * _TOKENS_TOGETHER
    room = text.length - 1

    def write(batch: Any) -> list[str]:
        beginning = {**batch, "text": without_answer(batch["text"])}
        most = np.full(len(beginning["text"]["valid"]), room)
        if text.embedding.learned_positions:
            used = beginning["text"]["valid"].sum(1)
            most = np.minimum(most, text.embedding.max_positions - used)
        return [texts[0].text for texts in predictor.continue_text(beginning, most, room)]

    preparers = interleaved_preparers(predictor.task.modalities, shots + 1, length)
    return predictor.over(rows, batch_size, write, preparers)


def examples_of(support: Sequence[Record], prompted: bool) -> list[tuple[Item, tuple[Text, ...]]]:
    """Returns images with their captions, or where `prompted` with their questions and answers."""
    found = []
    for record in support:
        texts = tuple(text for text in record.texts if bool(text.prompt) == prompted)
        if record.image and texts:
            found.append((Item("image", record.image), texts))
    return found


def prompt_row(
    number: int,
    record: Record,
    prompt: str,
    examples: Sequence[tuple[Item, tuple[Text, ...]]],
    shots: int,
    seed: int,
) -> Row:
    """Returns a document of examples drawn by (seed, number), then the image and its prompt.

    Raises:
      ValueError: there are fewer examples than shots.
    """
    if len(examples) < shots:
        kind = "question" if prompt else "caption"
        raise ValueError(
            f"evaluation.shots={shots}: only {len(examples)} training images have a {kind}"
        )
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    parts: list[Part] = []
    for index in rng.choice(len(examples), shots, replace=False):
        picture, texts = examples[index]
        parts += [picture, texts[rng.integers(len(texts))]]
    assert record.image is not None
    parts += [Item("image", record.image), Text(prompt, "")]
    return Row((Document(record.id, tuple(parts)),))


def without_answer(text: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the text cut after its last token that is not scored, where the answer begins."""
    given = text["valid"] & ~text["scored"]
    places = np.arange(given.shape[1])
    last = np.where(given, places, 0).max(1)
    return {**text, "valid": text["valid"] & (places <= last[:, None])}
