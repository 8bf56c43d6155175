"""Answers by the question alone, for questions whose answer the picture would not change.

A question is read without the picture first. Where the answer is as likely as a calibrated
threshold asks (`python -m unified_mm.calibrate`), it stands, and the picture is never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unified_mm.inference.decoding import Written
from unified_mm.nn.options import TransformerOptions
from unified_mm.objectives.captioning import Captioning
from unified_mm.task import Task

QUESTION_ONLY = "question_only"  # beside the kinds of texts that leave layers early
ROWS = 16  # questions that are read at once by each device


def can_answer_alone(task: Task) -> bool:
    """Returns whether a model writes, and can without any context, as early fusion can.

    Where a token of the text stands for the picture, the text has no place without it.
    """
    writes = any(isinstance(each, Captioning) for each in task.objectives)
    alone = task.model.reads_text_alone and task.tokenizer.image_id is None
    return writes and alone and "text" in task.modalities


def without_context(task: Task) -> Task:
    """Returns the task of the same parameters that reads texts alone."""
    text = {"text": task.modalities["text"]}
    model = task.model
    alone = model.clone(
        modalities={"text": model.modalities["text"]}, options=of_text(model.options)
    )
    return replace(task, modalities=text, model=alone)


def of_text(options: TransformerOptions) -> TransformerOptions:
    """Returns the options of a stack without what they say of other modalities."""
    found = replace(options, sparse=tuple(each for each in options.sparse if each[0] == "text"))
    if options.feed_forward_type != "neurons":
        return found
    own = {**dict(options.feed_forward_options), "of": ()}  # texts use all neurons
    return replace(found, feed_forward_options=tuple(own.items()))


def confidence(answer: Written) -> float:
    """Returns the probability of an answer, with its end."""
    return math.exp(answer.log_likelihood)


def sure(answers: dict[str, Written], threshold: float) -> dict[str, Written]:
    """Returns the answers that are at least as likely as a threshold."""
    return {each: text for each, text in answers.items() if confidence(text) >= threshold}


def disagreement(alone: Sequence[Written], beside: Sequence[str], threshold: float) -> np.ndarray:
    """Returns for each example 1 where its answer would be another than beside its picture."""
    return np.array(
        [
            float(confidence(text) >= threshold and text.text != other)
            for text, other in zip(alone, beside, strict=True)
        ]
    )
