"""Few-shot documents: their room is known before anything is trained or written."""

from dataclasses import replace

import pytest
import tiny

from unified_mm.data.coco import Question
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.evaluation.evaluate import Split, check_split
from unified_mm.evaluation.few_shot import FewShot, write_after_shots
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor


def records(count):
    texts = (Text("", tiny.TEXTS[0]), Text("red?", "red"))
    return [Record(number, {"image": f"{number}.jpg"}, texts, True) for number in range(count)]


def split_of(shots, questions=()):
    shown = FewShot(shots=shots, support=records(9), images=3, questions=3)
    return Split(
        Manifest("val", tuple(records(3)), "coco", "/data", "x"),
        questions=questions,
        few_shot=shown,
    )


@pytest.fixture(scope="module")
def task():
    return tiny.task(model__modalities__text__max_positions=40)


def test_a_document_beyond_the_learned_positions_is_refused_with_the_numbers(task):
    tokenizer = task.tokenizer
    each = len(tokenizer.encode_prompt("")) + len(tokenizer.ids(tiny.TEXTS[0])) + 1
    fit = (40 - 2) // each  # the last one has its begin and at least one token to write
    check_split(split_of((0, fit)), task)
    too_many = fit + 1
    message = f"evaluation.shots={too_many}: .* has {too_many * each + 1} text tokens.*40 positions"
    with pytest.raises(ValueError, match=message):
        check_split(split_of((0, too_many)), task)
    asked = [(record, "") for record in records(3)]
    options = split_of((too_many,)).few_shot
    predictor = Predictor(task, None, one_device_mesh())
    with pytest.raises(ValueError, match=message):
        write_after_shots(predictor, asked, too_many, options, 4)


def test_questions_and_shots_that_are_not_there_are_checked_too(task):
    asked = [Question(n, n, "red?" * 30, "red", ("red",), "other", "what") for n in range(3)]
    with pytest.raises(ValueError, match="no room is left for its answer"):
        check_split(split_of((0,), asked), task)
    with pytest.raises(ValueError, match="evaluation.shots=10: only 9 training images"):
        check_split(split_of((10,)), task)
    rotary = replace(
        task.modalities["text"],
        embedding=replace(task.modalities["text"].embedding, learned_positions=False),
    )
    endless = replace(task, modalities={**task.modalities, "text": rotary})
    check_split(split_of((0, 9), asked), endless)
