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
from unified_mm.analysis.comparison import summarise
from unified_mm.compare import sizes_of
from unified_mm.config import Config
from unified_mm.default_config import defaults
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.folder import RunFolder, RunFolderError
from unified_mm.runs.saved import new_field, refuse_unknown
from unified_mm.search.search_index import model_identity
from unified_mm.training.start_from import config_from_run, weights_to_start_from

HERE = Path(__file__).parent
TRAINED = ("early", "gated", "late")
# These are read as a version would have written them that knew but half of the fields.
OLDER = ("late", "clip")
IMAGES = [HERE / "coco" / "images" / "val" / f"{number}.jpg" for number in range(3)]
TEXTS = ["a red square of size 1", "blue, size 2", "a green square of size 3"]
IDENTITY = {
    "step": 40,
    "parameters": "df851a6bfb4ffa294088cc106380e131a321fa97727e20d21f497fe227ead9bc",
    "reading": "2cd21e716f04b0a7b1af2aa3ed44609aa089b81d39e9ed00607c73d0daa16c6d",
}
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
    for name in OLDER:
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        missing = take_defaults_away(config, defaults())
        assert len(missing) > 40
        path.write_text(json.dumps(config))
    return {path.name: path for path in folder.iterdir()}


def take_defaults_away(fields, usual):
    """Takes from a config every other field that has its default; returns what was taken."""
    taken = []
    for number, (name, value) in enumerate(sorted(fields.items())):
        default = usual.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            taken += take_defaults_away(value, default)
        elif number % 2 and name not in ("type", "weight") and value == as_saved(default):
            taken.append(fields.pop(name, name))
    return taken


def as_saved(value):
    return json.loads(json.dumps(value))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, tmp_path):
    """The runs name their pictures from there."""
    monkeypatch.chdir(HERE.parents[1])
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))


def todays(flags):
    """The flags that made a run, of the recipe as it was, fields by their names of today."""
    named = [flag.removeprefix("--config.").partition("=") for flag in flags]
    return [
        flag.replace("configs/coco.py", "experiments/recipe.py")
        if flag.startswith("--config=")
        else f"--config.{new_field(field)}={value}"
        for flag, (field, _, value) in zip(flags, named, strict=True)
    ]


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


@pytest.mark.parametrize(
    "name", ["early", *(pytest.param(name, marks=pytest.mark.slow) for name in TRAINED[1:])]
)
def test_a_run_goes_on_as_it_would_have(runs, name, tmp_path):
    workdir, expected = tmp_path / "again", told(name)
    shutil.copytree(runs[name], workdir)
    (workdir / "result.json").unlink()
    steps = expected["step"] + 5
    arguments = (f"--workdir={workdir}", f"--config.train.steps={steps}")
    commands.train(*todays(expected["flags"]), *arguments)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {str(line["step"]): line for line in lines if "loss" in line}
    assert len(expected["losses"]) == 5
    for step, losses in expected["losses"].items():
        assert {name: found[step][name] for name in losses} == pytest.approx(losses, rel=1e-5)


def test_a_later_run_is_refused_with_what_is_not_known(runs, tmp_path, capsys):
    workdir = shutil.copytree(runs["early"], tmp_path / "later")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["experts"] = 4
    (workdir / "config.json").write_text(json.dumps(config))
    told_why = "written by a later version: this one does not know the field model.experts"
    with pytest.raises(RunFolderError, match=told_why):
        unified_mm.load(workdir)
    with pytest.raises(RunFolderError, match=told_why):
        config_from_run(tiny.config_dict(model__start_from__text=str(workdir)), ())
    with pytest.raises(RunFolderError, match=told_why):
        summarise(RunFolder(workdir), "later", {})
    assert commands.run(*todays(told("early")["flags"]), f"--workdir={workdir}") == 1
    assert told_why in capsys.readouterr().err


@pytest.mark.parametrize("name", OLDER)
def test_a_run_that_knew_fewer_fields_is_counted_and_compared(runs, name):
    params = unified_mm.load(runs[name]).params
    sizes = sizes_of(RunFolder(runs[name]))
    assert sizes["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert summarise(RunFolder(runs[name]), name, sizes).config["model"]["norm"] == "layer"


def test_an_index_stays_its_models(runs):
    """As the revision that made the runs wrote it into the header of an index."""
    assert model_identity(unified_mm.load(runs["early"])) == IDENTITY


@pytest.mark.parametrize(("name", "part", "fusion"), PARTS)
def test_a_run_lends_its_weights(runs, name, part, fusion):
    changes = {"model__fusion": fusion, f"model__start_from__{part}": str(runs[name])}
    adopted = config_from_run(tiny.config_dict(objectives__matching__weight=0.0, **changes), ())
    refuse_unknown(adopted.to_dict(), defaults())  # so that a run of it can be loaded again
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
