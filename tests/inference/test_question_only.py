"""Answers without their picture: as without any, where they are likely enough, and counted."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

import unified_mm
from unified_mm import calibrate
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.inference import predictor as predictor_module
from unified_mm.inference import text_flops
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor
from unified_mm.inference.question_only import (
    QUESTION_ONLY,
    can_answer_alone,
    confidence,
    disagreement,
    without_context,
)
from unified_mm.nn.attention.rules import View

QUESTIONS = ["a red", "a blue square", "a red", "a green", "size"]


@pytest.fixture(scope="module")
def predictor():
    task = tiny.task(objectives__matching__weight=0.0, model__rotary_base=100.0)
    return Predictor(task, tiny.writing_params(task, task.tokenizer.eos_id), one_device_mesh())


@pytest.fixture(scope="module")
def batch(predictor):
    """Of pictures alone."""
    return {"image": jax.tree.map(np.asarray, tiny.batch(predictor.task, len(QUESTIONS))["image"])}


def missing(batch):
    """The batch without its pictures."""
    image = batch["image"]
    return {"image": {**image, "present": np.zeros_like(image["present"])}}


def test_it_is_the_answer_where_the_picture_is_absent(predictor, batch):
    alone = predictor.answers_alone(QUESTIONS)
    assert list(alone) == list(dict.fromkeys(QUESTIONS))
    absent = predictor.generate(missing(batch), QUESTIONS)
    for question, (text,) in zip(QUESTIONS, absent, strict=True):
        assert alone[question].tokens == text.tokens
        np.testing.assert_allclose(alone[question].log_likelihood, text.log_likelihood, rtol=1e-4)


def test_an_answer_stands_where_it_is_likely_enough_whatever_is_asked_beside(predictor, batch):
    alone = predictor.answers_alone(QUESTIONS)
    beside = [texts[0] for texts in predictor.generate(batch, QUESTIONS)]
    assert any(text.tokens != alone[q].tokens for q, text in zip(QUESTIONS, beside, strict=True))
    middle = sorted(map(confidence, alone.values()))[2]
    asking = predictor.leaving({QUESTION_ONLY: middle})
    found = asking.generate(batch, QUESTIONS)
    assert 0 < sum(confidence(alone[q]) >= middle for q in QUESTIONS) < len(QUESTIONS)
    for question, (text,), other in zip(QUESTIONS, found, beside, strict=True):
        assert text == (alone[question] if confidence(alone[question]) >= middle else other)
    some = [q for q in QUESTIONS if confidence(alone[q]) >= middle]
    none: dict = {}  # no picture is read where all stand
    assert asking.generate(none, some) == [[alone[q]] for q in some]
    assert predictor.leaving({QUESTION_ONLY: 2.0}).generate(batch, QUESTIONS) == [
        [text] for text in beside
    ]


def test_other_parameters_have_other_answers(predictor):
    alone = predictor.answers_alone(QUESTIONS)
    other = predictor.at(jax.tree.map(lambda x: -x, predictor.params)).answers_alone(QUESTIONS)
    assert other != alone == predictor.answers_alone(QUESTIONS)


def test_what_reads_questions_alone_is_compiled_once(predictor, monkeypatch):
    made = []
    monkeypatch.setattr(
        predictor_module, "without_context", lambda task: made.append(task) or without_context(task)
    )
    asked = predictor.at(predictor.params)
    asked._reader = None
    assert list(asked.answers_alone(["a red"]) | asked.answers_alone(["size"])) == ["a red", "size"]
    asked.at(predictor.params).answers_alone(["a blue"])
    assert len(made) == 1


def test_the_oldest_answers_are_forgotten(predictor, monkeypatch):
    monkeypatch.setattr(predictor_module, "KNOWN", 2)
    asked, known = predictor.at(predictor.params), predictor.answers_alone(QUESTIONS)
    for _ in range(2):  # more at once than are kept, and then again
        assert asked.answers_alone(QUESTIONS) == known
        assert len(asked._alone) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model__feed_forward_type": "neurons", "objectives__neurons__weight": 1.0},
        {"model__sparse": {"image": {"grid": 1}, "text": {"window": 1, "random": 1, "block": 3}}},
    ],
)
def test_options_of_pictures_are_left_out_of_what_reads_texts(changes):
    """Which reads them as beside a picture that is absent."""
    task = tiny.task(**changes, model__rotary_base=100.0)
    batch, view = tiny.batch(task, 2), View("captioning", "prefix", autoregressive=True)
    batch = jax.tree.map(jnp.asarray, missing(batch)) | {"text": batch["text"]}
    params = tiny.params(task)
    alone = without_context(task).model.apply(
        {"params": params}, batch["text"], view, method="read_text"
    )
    beside = task.model.apply({"params": params}, batch, (view,), method="encode")
    there = batch["text"]["valid"]
    np.testing.assert_allclose(alone[there], beside["captioning"].text[there], atol=2e-5)


def test_an_answer_cut_short_is_refused(predictor, batch):
    asking = predictor.leaving({QUESTION_ONLY: 0.0})
    for decoding in (Decoding(tokens=1), Decoding(stop=("a",))):
        with pytest.raises(ValueError, match="calibrated whole, .*: give neither tokens nor stop"):
            asking.generate(batch, QUESTIONS, decoding)
    assert asking.generate(batch, [""] * len(QUESTIONS), Decoding(tokens=1))


def test_captions_are_never_without_their_picture(predictor, batch):
    asking = predictor.leaving({QUESTION_ONLY: 0.0})
    prompts = [""] * len(QUESTIONS)
    assert asking.generate(batch, prompts) == predictor.generate(batch, prompts)


def test_disagreement_counts_what_stands_and_is_another(predictor):
    alone = predictor.answers_alone(QUESTIONS)
    one, two = alone["a red"], alone["size"]
    least = min(confidence(one), confidence(two))
    assert disagreement([one, two], [one.text, "no"], 0.0).tolist() == [0, 1]
    assert disagreement([one, two], ["no", "no"], 2.0).tolist() == [0, 0]
    assert disagreement([one, two], ["no", "no"], least).tolist() == [1, 1]


def test_what_reads_pictures_through_towers_is_not_asked_alone():
    for fusion in ("gated_cross_attention", "late"):
        assert not can_answer_alone(
            tiny.task(model__fusion=fusion, objectives__matching__weight=0.0,
                      objectives__captioning__weight=float(fusion != "late"))
        )  # fmt: skip
    features = tiny.task(model__fusion="early_features", objectives__matching__weight=0.0)
    assert can_answer_alone(features)
    plain = Tokenizer.from_str(tiny.tokenizer().as_json())
    placed = TextTokenizer(plain, image="<unk>")
    assert not can_answer_alone(replace(features, tokenizer=placed))


def stood_in(predictor, prompts, tokens, left=()):
    """Ten for each text alone, and a thousand for one with its picture."""
    assert len(prompts) == len(tokens) and min(tokens) > 0 and left == ()
    return len(prompts) * (1000 if predictor.task.model.context_names else 10)


def test_a_run_that_answers_is_calibrated(tmp_path, capsys, monkeypatch):
    folder = tiny.write_coco(tmp_path / "coco") / "annotations"
    asked = [
        {"image_id": n, "question_id": n, "question": QUESTIONS[n % 2] + "?"} for n in range(8)
    ]
    given = [
        {"question_id": n, "image_id": n, "question_type": "", "answer_type": "",
         "multiple_choice_answer": "red", "answers": [{"answer": "red"}]}
        for n in range(8)
    ]  # fmt: skip
    (folder / "questions_val.json").write_text(json.dumps({"questions": asked}))
    (folder / "answers_val.json").write_text(json.dumps({"annotations": given}))
    changes = {
        "data__dir": str(tmp_path / "coco"),
        "data__cache_dir": str(tmp_path / "cache"),
        "objectives__matching__weight": 0.0,
        "evaluation__questions": True,
    }
    task = tiny.task(**changes)
    run = tiny.write_run(tmp_path / "run", tiny.config_dict(**changes), tiny.params(task))
    # One of the two questions is to be answered alone.
    known = unified_mm.load(run).predictor.answers_alone([each["question"] for each in asked])
    monkeypatch.setattr(calibrate, "THRESHOLDS", (max(map(confidence, known.values())),))
    monkeypatch.setattr(text_flops, "text_flops", stood_in)
    with pytest.raises(SystemExit) as ended:
        calibrate.main([f"--run={run}", "--tolerance=0.9", "--error=0.5"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    result = json.loads(said.out.splitlines()[-1])
    found = result["texts"][QUESTION_ONLY]
    assert found["examples"] == 8 and found["read"] == 0.5 and found["risk"] < 0.9
    # All questions are read alone first, and half of them again with their pictures.
    assert found["flops"] == {"full": 1000, "expected": 10 + 500}
    assert f"{QUESTION_ONLY}: 510 FLOPs expected of a text by itself, of 1,000" in said.out
    assert result == json.loads((run / "exits.json").read_text())
