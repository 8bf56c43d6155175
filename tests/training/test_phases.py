"""Phases one after another: what is frozen keeps its bits, and a run that stops goes on alike."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import tiny

import unified_mm
from unified_mm.config import Config
from unified_mm.data.mixture import Mixture
from unified_mm.default_config import phase
from unified_mm.inference.predictor import Predictor
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.training.layout import in_training
from unified_mm.training.loop import epochs_of, train
from unified_mm.training.output import output_of
from unified_mm.training.phases import build_phases
from unified_mm.training.setup import prepare

RECIPE = Path(__file__).parents[2] / "configs" / "coco_flamingo.py"
LANGUAGE = ("transformer", "embedders_text")
GATED = ("transformer/layers/cross", "resamplers_image")
PHASES = {"phase_0": 2, "phase_1": 2, "phase_2": 3, "phase_3": 2}
STEPS = sum(PHASES.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")


def arguments(data, workdir, *more):
    return (
        f"--config={RECIPE}:tiny",
        *(flag for flag in commands.SMALL if not flag.startswith("--config.train.steps")),
        f"--config.train.steps={STEPS}",
        *(f"--config.train.phases.{name}.steps={steps}" for name, steps in PHASES.items()),
        "--config.model.resampler.latents=3",
        "--config.model.resampler.layers=1",
        # Fewer parameters, which are compiled one by one.
        "--config.model.norm=rms",
        "--config.model.query_bias=False",
        "--config.model.output_bias=False",
        "--config.model.feed_forward_bias=False",
        "--config.data.documents.shots=2",
        "--config.data.documents.images=3",
        "--config.data.documents.length=36",
        "--config.checkpoint.every=1",
        "--config.checkpoint.keep=20",
        "--config.logging.every=1",
        f"--config.data.dir={data}",
        f"--workdir={workdir}",
        *more,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("runs") / "flamingo"
    commands.train(*arguments(data, workdir))
    return workdir


@pytest.fixture(scope="module")
def setup(finished):
    """What the finished run began with."""
    folder = RunFolder(finished)
    return prepare(Config(json.loads(folder.config.read_text())), folder, lambda _: None)


@pytest.fixture(scope="module")
def params_at(finished):
    """What gives the parameters of a run like the finished one at a step, by path."""
    params = unified_mm.load(finished).params
    wanted = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)}

    def read(workdir, step):
        with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            state = checkpoints.restore(wanted, step=step, partial=True).state
        leaves = jax.tree_util.tree_leaves_with_path(state["params"])
        return {path_of(path): np.asarray(leaf) for path, leaf in leaves}

    return read


def test_what_a_phase_freezes_keeps_its_bits_and_the_rest_moves(finished, params_at):
    at = {step: params_at(finished, step) for step in (1, 2, 4, 7, 9)}
    gated = {name for name in at[1] if name.startswith(GATED)}
    language = {name for name in at[1] if name.startswith(LANGUAGE)} - gated
    for start, stop, learns in (
        (1, 2, set(at[1]) - gated),
        (2, 4, language),
        (4, 7, gated),
        (7, 9, gated),
    ):
        moved = {name for name in at[stop] if (at[start][name] != at[stop][name]).any()}
        assert moved <= learns, moved - learns
        # A key's bias moves no softmax; and nothing behind a closed gate learns in a first step.
        assert len(moved) > 0.6 * len(learns), learns - moved
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "loss" in line}
    assert "contrastive/loss" in by_step[2] and "contrastive/loss" not in by_step[3]
    assert by_step[4]["gate/attention_0"] == 0 and by_step[9]["gate/attention_0"] > 0
    # Each phase warms up and cools down by itself.
    rates = [by_step[step]["learning_rate"] for step in range(1, STEPS + 1)]
    for before, after in ((0, 1), (2, 3), (4, 5), (7, 8)):
        assert rates[before] == 0 < rates[after]


def test_frozen_parameters_have_no_optimizer_state(setup):
    for stretch in setup.phases:
        part = jax.tree.leaves(stretch.optimizer.part(stretch.abstract.params))
        trained = sum(leaf.size * leaf.dtype.itemsize for leaf in part)
        state = jax.tree.leaves(stretch.abstract.optimizer)
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stretch.abstract.params))
        assert 0 < trained < whole
        assert kept == 2 * trained + 4  # two moments, and Adam's count of steps


# Where one ends and the next begins, and within a phase.
@pytest.mark.parametrize(
    "step", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 5))]
)
def test_a_run_that_stopped_anywhere_ends_in_the_same_bits(
    finished, setup, params_at, tmp_path, step
):
    workdir = tmp_path / "again"
    shutil.copytree(finished, workdir)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    again = replace(setup, folder=RunFolder(workdir))
    said = []
    predictor = Predictor(again.task, None, again.mesh)
    train(again, output_of(again.folder, said.append), predictor)
    assert f"resuming at step {step} of {STEPS}" in said
    expected, found = params_at(finished, STEPS), params_at(workdir, STEPS)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """What gives a small run on pairs as prepared, with the phases that a config asks for."""
    folder = tmp_path_factory.mktemp("prepared")
    fields = {"data__dir": str(data), "data__cache_dir": str(folder)}
    plain = Config(tiny.config_dict(**fields).to_dict())
    setup = prepare(plain, RunFolder(folder / "run"), lambda _: None)
    (only,) = setup.phases

    def with_phases(phases):
        config = Config(tiny.config_dict(**fields, train__phases=phases).to_dict())
        task = in_training(config, setup.task, setup.mesh)
        abstract = only.abstract.replace(optimizer=None)
        built = build_phases(config, task, setup.train, abstract, only.placement)
        return replace(setup, config=config, phases=built)

    return with_phases


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": -1}, "train.phases.a.steps=-1: must be at least 0"),
        ({"steps": 0}, "train.steps=4, but train.phases have 0 steps together"),
        ({"steps": 3}, "train.steps=4, but train.phases have 3 steps together"),
        ({"data": "sounds"}, "train.phases.a.data='sounds': must be one of pairs, text, documents"),
        ({"data": "documents"}, "set model.modalities.text.max_positions to at least 160"),
        ({"objectives": {"answering": 1.0}}, "train.phases.a.objectives.answering: no objectives"),
        ({"objectives": {"contrastive": 0.0}}, "matching needs contrastive.weight above 0"),
        ({"train": {"freeze_rules": ((".*", True),)}}, "leave nothing to train"),
        ({"train": {"speed": 1.0}}, "no field train.speed"),
        ({"train": {"ema_warmup": True}}, "phases.a.train.ema_warmup=True: .* all phases"),
        ({"train": {"batch_size": 0}}, "train.batch_size=0: must be at least 1"),
    ],
)
def test_wrong_phases_are_refused(prepared, options, named):
    with pytest.raises((ValueError, KeyError), match=named):
        prepared({"a": {**phase(4), **options}})


def test_wrong_phases_are_refused_before_the_first_step(data, tmp_path):
    config = tiny.config_dict(
        data__dir=str(data), data__cache_dir=str(tmp_path), train__phases={"a": phase(3)}
    )
    with pytest.raises(ValueError, match="train.steps=4, but train.phases have 3 steps together"):
        prepare(Config(config.to_dict()), RunFolder(tmp_path / "run"), lambda _: None)


def test_a_phase_of_no_steps_is_left_out(prepared):
    phases = {"a": phase(0), "b": phase(4), "c": phase(0, data="documents")}
    (only,) = prepared(phases).phases
    assert (only.name, only.start, only.stop) == ("b", 0, 4)


def test_what_was_read_is_counted_by_the_batches_of_each_phase(prepared):
    setup = prepared({"a": phase(1, train={"batch_size": 16}), "b": phase(3)})
    read = [sum(each.rows_read(step) for each in setup.phases) for step in (0, 1, 2, 4)]
    assert read == [0, 16, 24, 40]
    mixture = Mixture(setup.train.records, {"all": (np.arange(20),)}, {"all": 1.0})
    phases = [replace(each, rows=replace(each.rows, examples=mixture)) for each in setup.phases]
    assert [epochs_of(phases, step)["epochs/all"] for step in (1, 4)] == [0.8, 2.0]


def test_text_alone_is_pairs_without_their_images(prepared):
    weights = {"captioning": 1.0, "contrastive": 0.0, "matching": 0.0}
    setup = prepared({"a": phase(4, data="text", objectives=weights)})
    (stretch,) = setup.phases
    assert all(record.image is None for record in stretch.rows.examples)
    assert [record.texts for record in stretch.rows.examples] == [
        record.texts for record in setup.train.records
    ]
