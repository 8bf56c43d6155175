"""`python -m unified_mm.compare` on runs of several kinds as they lie on disk."""

import json

import jax.numpy as jnp
import pytest
import tiny

from unified_mm import compare
from unified_mm.files import write_json
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.training import sizes

NO_MATCHING = {"objectives__matching__weight": 0.0}
KINDS = {
    "early": NO_MATCHING,
    "gated": NO_MATCHING | {"model__fusion": "gated_cross_attention"},
    "late": NO_MATCHING | {"model__fusion": "late", "objectives__captioning__weight": 0.0},
}


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module", autouse=True)
def measured_once():
    """Sizes are measured by tracing, here once for each config."""
    measure, known = sizes.measure_sizes, {}

    def measured(config):
        fields = json.dumps(config.as_dict(), sort_keys=True)
        if fields not in known:
            known[fields] = measure(config)
        return known[fields]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "measure_sizes", measured)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs without checkpoints, of which the first is finished."""
    root = tmp_path_factory.mktemp("runs")
    for name, changes in KINDS.items():
        write_json(RunFolder(root / name).config, tiny.config_dict(**changes).to_dict())
    scores = {"text_to_image/recall_at_1": 0.5}
    write_json(RunFolder(root / "early").result, {"scores": scores, "steps": 4, "flops": 1e12})
    return [root / name for name in KINDS]


def test_runs_of_all_fusions_are_compared(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(*folders, "--output", page) == 0
    said = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in said.splitlines()}
    assert "early" in lines["kind"] and "gated_cross_attention" in lines["kind"]
    assert lines["state"].count("unfinished, step 0 of 4") == 2
    assert lines["parameters"].count("(x ") == 2 and "–" not in lines["parameters"]
    # Two towers write no text.
    assert lines["FLOPs of a generated token"].count("–") == 1
    assert lines["text_to_image/recall_at_1"].count("–") == 2
    assert "model.fusion" in lines and page.read_text().startswith("<!doctype html>")
    assert run(*folders, "--output", page) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_what_a_calibrated_run_expects_a_text_to_cost_is_compared(folders, tmp_path, capsys):
    config = tiny.config_dict(**KINDS["early"]).to_dict()
    for name, flops in (("one", {"full": 200, "expected": 120}), ("two", {})):
        write_json(RunFolder(tmp_path / name).config, config)
        found = {"threshold": 0.5, **({"flops": flops} if flops else {})}
        write_json(RunFolder(tmp_path / name).exits, {"texts": {"caption": found}})
    assert run(tmp_path / "one", tmp_path / "two") == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-2:] for line in said.splitlines()}
    assert rows["FLOPs of a text (caption), full"] == ["200", "–"]
    assert rows["FLOPs of a text (caption), expected"] == ["120", "–"]


def test_what_a_text_cost_at_another_step_is_left_out(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    found = {"threshold": 0.5, "flops": {"full": 200}}
    write_json(folder.exits, {"step": 7, "state": "last", "texts": {"caption": found}})
    for step in (7, 8):
        with Checkpoints(folder.checkpoints) as checkpoints:
            checkpoints.save(step, tiny.state({"x": jnp.zeros(1)}, step), {})
        costs = compare.expected_costs(folder)
        assert costs == ({"FLOPs of a text (caption), full": 200} if step == 7 else {})
    assert "exits.json is of step 7, and the run is at 8" in capsys.readouterr().out


def test_exits_without_texts_cost_nothing_that_is_known(tmp_path):
    folder = RunFolder(tmp_path)
    write_json(folder.exits, {"layers": [4]})
    assert compare.expected_costs(folder) == {}


def test_one_run_under_two_names_is_refused(folders, tmp_path, capsys):
    (tmp_path / "link").symlink_to(folders[0], target_is_directory=True)
    assert run(folders[0], tmp_path / "link") == 1
    assert "is given twice, by this name or another" in capsys.readouterr().err


WRONG = {"scores": {"caption/nats": 1.0}, "flops": "many"}


def test_a_damaged_result_is_named(folders, tmp_path, capsys):
    config = tiny.config_dict(**KINDS["early"]).to_dict()
    odd = RunFolder(tmp_path / "odd")
    write_json(odd.config, config)
    for content in ([1], {"scores": None}, {"scores": {"caption/nats": "x"}}, WRONG):
        write_json(odd.result, content)
        assert run(folders[0], tmp_path / "odd") == 1
        assert f"{odd.result} is damaged" in capsys.readouterr().err


def test_a_model_that_cannot_be_built_is_said_and_compared(folders, tmp_path, capsys):
    config = tiny.config_dict(**KINDS["early"]).to_dict()
    config["model"]["fusion"] = "of tomorrow"
    write_json(RunFolder(tmp_path / "odd").config, config)
    assert run(folders[0], tmp_path / "odd") == 0
    said = capsys.readouterr().out
    assert "parameters and FLOPs cannot be counted: model.fusion='of tomorrow'" in said
    (row,) = [line for line in said.splitlines() if line.startswith("model.fusion")]
    assert row.split()[1:] == ['"early"', '"of', 'tomorrow"']
    assert "note: without scores: odd" in said


def test_what_is_no_run_is_refused(folders, tmp_path, capsys):
    assert run(folders[0], tmp_path) == 1
    assert "is no run" in capsys.readouterr().err
    assert run(folders[0]) == 1
    assert "two runs or more" in capsys.readouterr().err
    assert run(folders[0], folders[0]) == 1
    assert "given twice" in capsys.readouterr().err
