"""`python -m unified_mm.calibrate` as a user types it, and the commands that take what it found."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hand_counts import text_by_hand

import unified_mm
from unified_mm import calibrate, generate, main, quantize
from unified_mm.files import read_json, write_json

EXITS = {"model__exits": (1,), "objectives__exits__weight": 1.0}


def write_run(folder, name, **changes):
    """A run of random weights on eight pictures that are scored."""
    changes |= {
        "data__dir": str(folder / "coco"),
        "data__cache_dir": str(folder / "cache"),
        "objectives__matching__weight": 0.0,
    }
    task = tiny.task(**changes)
    return tiny.write_run(folder / name, tiny.config_dict(**changes), tiny.params(task))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run with exits and one without."""
    folder = tmp_path_factory.mktemp("calibrate")
    tiny.write_coco(folder / "coco")
    write_run(folder, "early", **EXITS)
    write_run(folder, "plain")
    write_run(folder, "gated", model__fusion="gated_cross_attention", evaluation__questions=True)
    only_contrast = {"objectives__captioning__weight": 0.0, "evaluation__questions": True}
    write_run(folder, "contrast", **only_contrast)
    return folder


def ended(command, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    return stopped.value.code


def test_it_writes_the_boldest_threshold_that_it_said_and_never_over_another(runs, capsys):
    run = runs / "early"
    asked = ("--run", run, "--tolerance", "0.6")
    assert ended(calibrate, *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    found = result["texts"]["caption"]
    assert read_json(run / "exits.json") == result
    assert (result["layers"], result["step"], found["examples"]) == ([1], 7, 8)
    assert result["dtype"] == "float32"
    assert 0.5 <= found["depth"] <= 1 and found["risk"] < 0.6
    flops, (left,) = found["flops"], found["left"]
    assert found["depth"] == pytest.approx(1 - left / 2)
    tokens = 1 + (flops["full"] - text_by_hand(1, 1)) / (text_by_hand(1, 2) - text_by_hand(1, 1))
    assert 1 < tokens <= 11
    assert flops["expected"] == pytest.approx(text_by_hand(1, tokens, left), rel=1e-3)
    assert any(line.startswith(f"caption: {flops['expected']:,} FLOPs expected") for line in lines)
    said = f"caption at {found['threshold']}: {found['risk']:.4f} of the tokens would be others"
    assert any(line.startswith(said) for line in lines)

    assert ended(calibrate, *asked) == 1
    assert "give --replace" in capsys.readouterr().err
    assert ended(calibrate, *asked, "--replace", "--error", "0.2") == 0
    assert read_json(run / "exits.json")["texts"]["caption"]["error"] == 0.2


def test_generate_takes_what_was_found(runs, capsys):
    run, picture = runs / "early", next((runs / "coco" / "images" / "val").iterdir())
    # Whatever was found, tokens are to leave: else nothing would tell that it is taken.
    found = {"texts": {"caption": {"threshold": -1.0}}, "step": 7, "state": "last"}
    write_json(run / "exits.json", found)
    model = unified_mm.load(run, exits=True)
    assert model.predictor.exits == {"caption": -1.0}
    (expected,) = model.caption([picture])
    assert [expected] != unified_mm.load(run).caption([picture])
    capsys.readouterr()
    assert ended(generate, "--run", run, "--image", picture, "--exits", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected


def test_pictures_that_captions_do_not_need_are_found_and_taken_by_generate(
    runs, capsys, monkeypatch
):
    run, picture = runs / "plain", next((runs / "coco" / "images" / "val").iterdir())
    asked = ("--run", run, "--pictures", "--tolerance", "0.6")
    # Half of the examples fit, and half calibrate; no caption of these loses anything.
    monkeypatch.setattr(calibrate, "NEEDED", 1e9)
    assert ended(calibrate, *asked) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["texts"]["picture"]
    assert "worth" not in found and "worth" in read_json(run / "exits.json")["texts"]["picture"]
    assert (found["examples"], found["risk"]) == (4, 0.0)
    assert found["flops"]["expected"] < found["flops"]["full"] or found["read"] == 1
    text = read_json(run / "exits.json")
    text["texts"]["picture"]["threshold"] = 1e9  # whatever was found, it is sent away
    write_json(run / "exits.json", text)
    (expected,) = unified_mm.load(run, exits=True).caption([picture])
    assert expected != unified_mm.load(run).caption([picture])[0]
    assert ended(generate, "--run", run, "--image", picture, "--exits", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected

    monkeypatch.setattr(calibrate, "NEEDED", -1e9)  # each that is sent away was needed
    assert ended(calibrate, *asked, "--replace") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["texts"]["picture"]["read"] == 1
    (run / "exits.json").unlink()

    for name in ("gated", "contrast"):
        assert ended(calibrate, "--run", runs / name, "--pictures") == 1
        assert "does not write both beside a picture and without" in capsys.readouterr().err


def test_the_gain_of_a_picture_is_over_the_same_caption_with_none(runs):
    model = unified_mm.load(runs / "plain")
    asked = Namespace(split="", max_images=None, data_dir="")
    split, _ = quantize.open_scored(model, asked)
    gains, tokens, summaries = calibrate.worth_measured(model, split)
    first = [replace(record, texts=record.texts[:1]) for record in split.captioned]
    nothing = [replace(record, parts={}) for record in first]
    beside, without = (
        np.array(model.predictor.over(each, 4, model.predictor.log_likelihood))
        for each in (first, nothing)
    )
    np.testing.assert_array_equal(tokens, beside[:, 1])
    np.testing.assert_allclose(gains, (beside - without)[:, 0] / tokens, atol=1e-5)
    assert np.abs(gains).min() > 1e-4 and np.isfinite(summaries).all() and len(gains) == 8


@pytest.mark.slow
def test_evaluate_takes_what_was_found(runs, capsys):
    run = runs / "early"
    write_json(
        run / "exits.json",
        {"texts": {"caption": {"threshold": -1.0}}, "step": 7, "state": "last"},
    )
    results = []
    for flags in ((), ("--exits",)):
        assert ended(main, "--mode=evaluate", "--run", run, *flags) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[1]["exits"] == {"caption": -1.0} and "exits" not in results[0]
    assert results[0]["scores"]["caption/nats"] == results[1]["scores"]["caption/nats"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "no calibrated exits: python -m unified_mm.calibrate finds them"),
        ({"step": 6, "state": "last"}, "of the last state at step 6, and this is the last one"),
        ({"step": 7, "state": "best"}, "of the best state at step 7, and this is the last one"),
        ({"step": 7, "state": "last", "dtype": "bfloat16"}, "bfloat16, and here it computes in"),
    ],
)
def test_thresholds_of_another_state_or_none_are_refused(runs, found, message):
    run = runs / "early"
    (run / "exits.json").unlink(missing_ok=True)
    if found:
        write_json(run / "exits.json", {**found, "texts": {}})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        unified_mm.load(run, exits=True)


@pytest.mark.parametrize("name", ["plain", "gated", "contrast"])
def test_a_run_with_nothing_to_calibrate_is_refused_before_its_data_are_opened(
    runs, capsys, monkeypatch, name
):
    monkeypatch.setattr(quantize, "open_scored", lambda *_: pytest.fail("the data were opened"))
    assert ended(calibrate, "--run", runs / name) == 1
    assert "has no exits: train a run with --config.model.exits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("plain", ("--data_dir", "coco"), "has no exits: train a run with --config.model.exits"),
        ("early", ("--tolerance", "0.01", "--replace"), "no threshold keeps --tolerance=0.01"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_writes_nothing(
    runs, capsys, monkeypatch, name, flags, message
):
    exits = runs / name / "exits.json"
    exits.unlink(missing_ok=True)
    monkeypatch.chdir(runs)
    assert ended(calibrate, "--run", runs / name, *flags) == 1
    assert message in capsys.readouterr().err
    assert not exits.exists()
