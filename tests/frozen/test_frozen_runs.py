"""Runs that an earlier revision trained (`make.py`) load, score, resume and lend their weights."""

import json
import shutil
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import tiny

import unified_mm
from unified_mm.config import Config
from unified_mm.parallel.sharding import path_of
from unified_mm.training.start_from import adopt, weights_to_start_from

HERE = Path(__file__).parent
TRAINED = ("early", "gated", "late")
IMAGES = [HERE / "coco" / "images" / "val" / f"{number}.jpg" for number in range(3)]
TEXTS = ["a red square of size 1", "blue, size 2", "a green square of size 3"]
# A part of each kind, and the fusion that has a place for it.
PARTS = [
    ("early", "text", "early"),
    ("gated", "text", "early"),
    ("late", "image", "gated_cross_attention"),
    ("clip", "text", "early"),
    ("clip", "image", "late"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs' folders by name."""
    folder = tmp_path_factory.mktemp("frozen")
    for name in (*TRAINED, "clip"):
        shutil.unpack_archive(HERE / f"{name}.tar.xz", folder / name, filter="data")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, tmp_path):
    """The runs name their pictures from there."""
    monkeypatch.chdir(HERE.parents[1])
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))


def told(name):
    """What the revision of its time said of a run."""
    return json.loads((HERE / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [*TRAINED, "clip"])
def test_a_run_says_what_it_said(runs, name):
    model, expected = unified_mm.load(runs[name]), told(name)
    assert model.step == expected["step"]
    np.testing.assert_allclose(model.embed_images(IMAGES), expected["images"], atol=1e-5)
    np.testing.assert_allclose(model.embed_texts(TEXTS), expected["texts"], atol=1e-5)
    if "captions" in expected:
        assert model.caption(IMAGES) == expected["captions"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_is_scored_as_it_was(runs, name, capsys):
    assert commands.run("--mode=evaluate", f"--workdir={runs[name]}") == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert scores == pytest.approx(told(name)["scores"], abs=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_goes_on_as_it_would_have(runs, name, tmp_path):
    workdir, expected = tmp_path / "again", told(name)
    shutil.copytree(runs[name], workdir)
    (workdir / "result.json").unlink()
    steps = expected["step"] + 5
    arguments = (f"--workdir={workdir}", f"--config.train.steps={steps}")
    assert commands.run(*expected["flags"], *arguments) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {str(line["step"]): line for line in lines if "loss" in line}
    assert len(expected["losses"]) == 5
    for step, losses in expected["losses"].items():
        assert {name: found[step][name] for name in losses} == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("name", "part", "fusion"), PARTS)
def test_a_run_lends_its_weights(runs, name, part, fusion):
    changes = {"model__fusion": fusion, f"model__start_from__{part}": str(runs[name])}
    adopted = adopt(tiny.config_dict(objectives__matching__weight=0.0, **changes), ())
    found = weights_to_start_from(Config(adopted.to_dict()))
    leaves = jax.tree_util.tree_leaves_with_path(unified_mm.load(runs[name]).params)
    held = {path_of(path): np.asarray(leaf) for path, leaf in leaves}
    by_layer = {path for path in found if path not in held}
    assert len(by_layer) > 10 and len(found.keys() & held.keys()) > 2
    for path in found:
        if path not in by_layer:
            np.testing.assert_array_equal(found[path], held[path], err_msg=path)
            continue
        stack, _, place = path.partition("/layers/")
        layer, _, leaf = place.partition("/")
        stacked = held[f"{stack}/layers/block_0/{leaf}"]
        np.testing.assert_array_equal(found[path], stacked[int(layer)], err_msg=path)
