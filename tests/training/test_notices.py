"""What is said of a run before its first step."""

import pytest
import tiny

from unified_mm.config import Config
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.default_config import phase
from unified_mm.training.notices import cut_share, notices

SHORT, LONG = "a red square", " ".join(["a green square of size 3"] * 6)


def manifest(texts, examples=0):
    records = [Record(n, {"image": "x"}, (Text("", text),), True) for n, text in enumerate(texts)]
    records += [Record(len(texts) + n, {"image": "x"}, (), True) for n in range(examples)]
    return Manifest("train", tuple(records), "tests", "", "0")


def said(train, **changes):
    config = Config(tiny.config_dict(**changes).to_dict())
    return notices(config, tiny.task(**changes), train)


def test_epochs_are_said_and_that_a_batch_holds_an_example_several_times():
    train = manifest([SHORT] * 16)
    line, *_ = said(train, train__steps=3, train__batch_size=8)
    assert line == "3 steps of 8 examples are 1.5 epochs of 16"
    line, *_ = said(train, train__steps=1000, train__batch_size=40)
    assert line.startswith(
        "1,000 steps of 40 examples are 2.5e+03 epochs of 16; a batch holds every"
    )
    assert "2.5 times" in line and "same_item_negatives is False" in line
    phases = {"a": phase(1, train={"batch_size": 24}), "b": phase(3)}
    line, *_ = said(train, train__steps=4, train__phases=phases)
    assert line.startswith("1 steps of 24 and 3 steps of 8 examples are 3 epochs of 16; a batch")
    assert "1.5 times" in line


def test_the_share_of_cut_texts_is_said_with_the_length_that_would_do():
    train = manifest([SHORT] * 180 + [LONG] * 20, examples=5)
    task = tiny.task()
    needed = len(task.modalities["text"].tokenizer.ids(LONG)) + 2  # begin and end
    assert cut_share(task, train) == (0.1, needed)
    (line,) = [line for line in said(train) if "are cut" in line]
    field = "model.modalities.text.length"
    assert line == f"10.0% of texts are cut at {field}=12: {needed} would cut at most 1%"
    # That length is enough, and one less is not.
    for length, share in ((needed, 0.0), (needed - 1, 0.1)):
        there = tiny.task(model__modalities__text__length=length)
        assert cut_share(there, train)[0] == share
        assert any(
            "are cut" in each for each in said(train, **{"model__modalities__text__length": length})
        ) == bool(share)
    # One text of two hundred is less than the share that a length may cut.
    few = manifest([SHORT] * 199 + [LONG])
    share, enough = cut_share(task, few)
    assert share == 0.005 and enough < needed


def test_without_texts_nothing_is_cut():
    assert cut_share(tiny.task(), manifest([], examples=3)) == (0.0, 0)


def test_mirroring_is_said_where_pictures_are_mirrored():
    train = manifest([SHORT])
    assert any("data.mirror=False" in line for line in said(train))
    assert not any("data.mirror=False" in line for line in said(train, data__mirror=False))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moments_dtype": "bfloat16", "b2": 0.999}, "moments_rounding=stochastic"),
        ({"moments_dtype": "bfloat16", "b2": 0.98}, ""),
        ({"moments_dtype": "bfloat16", "b2": 0.999, "moments_rounding": "stochastic"}, ""),
        ({"b2": 0.999}, ""),
        ({"ema_decay": 0.9999, "steps": 1000}, "hold 90.5% of their random start after 1,000"),
        ({"ema_decay": 0.9999, "steps": 1000, "ema_warmup": True}, ""),
        ({"ema_decay": 0.9, "steps": 1000}, ""),
    ],
)
def test_what_an_optimizer_leaves_behind_is_said(changes, expected):
    plain = said(manifest([SHORT] * 8), train__steps=changes.get("steps", 4))
    found = said(manifest([SHORT] * 8), **{f"train__{k}": v for k, v in changes.items()})
    new = [line for line in found if line not in plain]
    assert len(new) == bool(expected) and (not new or expected in new[0])
