"""Parts from outside the package, each in a file of its user's, through the command and alone."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import commands
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import unified_mm
from unified_mm.config import Config
from unified_mm.nn import sow_auxiliary
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.unstack import unstack_layers
from unified_mm.objectives import TextObjective
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import param_shardings, rule_items, to_global
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.task import build_task
from unified_mm.training.loop import first_state
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.setup import prepare
from unified_mm.training.state import initial_state, state_of_phase
from unified_mm.training.step import gradients, make_train_step

RECIPE = Path(__file__).parent / "toy_parts_recipe.py"
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("outsiders") / "coco")


def flags_of(data, workdir):
    return f"--config={RECIPE}", f"--config.data.dir={data}", f"--workdir={workdir}"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    assert commands.run_uncounted(*flags_of(data, workdir)) == 0
    return workdir


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def state_of(run, step):
    """Every leaf of a checkpoint, by path."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        saved, _ = checkpoints._read_json_items(step)
        wanted = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
            for name, leaf in saved.items()
            if not name.startswith("key")
        }
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in wanted.items()
        }
        return checkpoints._read_leaves(step, wanted)


def test_a_run_of_outsiders_is_trained_scored_saved_and_loaded(run, data):
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["scores"]["text_to_image/recall_at_1"] <= 1
    assert "caption/cider_d" in result["scores"]
    model = unified_mm.load(run)
    block = model.params["transformer"]["layers"]["block_0"]["feed_forward"]
    width = model.config.model.width
    assert block["up"]["kernel"].shape == (model.config.model.layers, width, 3 * width)
    assert model.embed_images([data / "images" / "val" / "0.jpg"]).shape == (1, 8)
    assert isinstance(model.caption([data / "images" / "val" / "0.jpg"])[0], str)


def test_an_auxiliary_objective_comes_last_draws_and_sees_the_step(run):
    losses = [record["calm/loss"] for record in records(run)]
    assert len(set(losses)) == STEPS
    task = unified_mm.load(run).task
    assert [each.name for each in task.objectives][-1] == "calm"


def test_a_weight_may_be_a_schedule(run):
    for record in records(run):
        parts = record["contrastive/loss"], record["captioning/loss"], record["calm/loss"]
        total = parts[0] + 0.5 * parts[1] + 0.1 * parts[2]
        assert record["loss"] == pytest.approx(total, rel=1e-5)


def test_an_optimizer_and_a_schedule(run):
    rates = [record["learning_rate"] for record in records(run)]
    assert rates[1] == pytest.approx(rates[0] / 2) and rates[2] == pytest.approx(rates[0] / 4)
    before, after = state_of(run, 2), state_of(run, 3)
    name = "params/embedders_text/tokens"
    moved = np.abs(np.asarray(after[name]) - np.asarray(before[name]))
    # A sign moves by the rate, decay (which tokens have none of) apart, or not at all.
    steps = np.unique(np.round(moved / rates[2], 3))
    assert set(steps) <= {0.0, 1.0}


def test_a_treatment_is_kept_and_resumed_to_the_same_bits(run, data, tmp_path):
    at_once, workdir = state_of(run, 3), shutil.copytree(run, tmp_path / "again")
    assert int(at_once["treatment/steps"]) == 3
    assert "treatment/slow/embedders_text/tokens" in at_once
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "3")
    commands.train(*flags_of(data, workdir))
    resumed = state_of(workdir, 3)
    assert resumed.keys() == at_once.keys()
    for name, leaf in at_once.items():
        assert np.asarray(leaf).tobytes() == np.asarray(resumed[name]).tobytes(), name


def test_a_checkpoint_from_before_treatments_begins_with_the_first_value(run, tmp_path):
    folder = RunFolder(run)
    setup = prepare(Config(json.loads(folder.config.read_text())), folder, lambda _: None)
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        metadata = checkpoints.metadata()
    with jax.set_mesh(setup.mesh), Checkpoints(tmp_path) as checkpoints:
        state = setup.phases[0].enter(setup.make_state())
        checkpoints.save(2, state.replace(treatment=None), metadata)
        begun, step, _ = first_state(setup, checkpoints, lambda _: None)
    assert step == 2 and int(begun.treatment["steps"]) == 0
    jax.tree.map(np.testing.assert_array_equal, begun.treatment["slow"], state.params)


def test_a_backend_a_pool_and_a_loss(run):
    model = unified_mm.load(run)
    assert model.config.model.attention == "toy_parts:Written"
    batch = tiny.batch(model.task, 3)
    params, task = model.params, model.task
    key = jax.random.key(0)
    read = jax.jit(lambda params: task.metrics_and_embedded(params, batch, key, deterministic=True))
    metrics, embedded = read(params)
    images, texts = (np.asarray(each) for each in embedded["contrastive"].vectors)
    scale = float(metrics["contrastive/scale"][0])
    logits = scale * images @ texts.T
    others = np.maximum(0, 1 + logits) * (1 - np.eye(3))
    expected = (others.sum(1) - np.diag(logits)).sum()
    np.testing.assert_allclose(metrics["contrastive/loss"][0], expected, rtol=1e-4)
    plain = replace(task, model=task.model.with_options(attention="xla"))
    other, same = jax.jit(
        lambda params: plain.metrics_and_embedded(params, batch, key, deterministic=True)
    )(params)
    np.testing.assert_allclose(same["contrastive"].vectors[0], images, atol=1e-5)
    np.testing.assert_allclose(other["captioning/loss"], metrics["captioning/loss"], rtol=1e-5)


@dataclass(frozen=True)
class Length(TextObjective):
    """An objective of one field more."""

    margin: float = 0.5


class Breaking:
    """A treatment that makes what is not finite."""

    @classmethod
    def from_config(cls, train):
        return cls()

    def init(self, params):
        return jnp.zeros(())

    def __call__(self, kept, gradient, params, metrics, step):
        return kept + 1, jax.tree.map(lambda g: g / 0.0, gradient)


LEAVING = {
    "model__feed_forward_type": "toy_parts:Summing",
    "objectives__matching__weight": 0.0,
    "model__layers": 4,
}


@pytest.fixture(scope="module")
def leaving():
    """A task whose layers leave their mean, its parameters, a batch, and what is left."""
    task = tiny.task(**LEAVING)
    params, batch = tiny.params(task), tiny.batch(task, 8)
    batch["image"]["present"] = batch["image"]["present"].at[1].set(False)
    return task, params, batch, left(task, params, batch)


def left(task, params, batch):
    run = jax.jit(
        lambda params, batch: task.auxiliary(params, batch, jax.random.key(0), deterministic=True)
    )
    return {path: np.asarray(leaf) for path, leaf in run(params, batch).items()}


def test_what_layers_leave_is_what_they_put_out(leaving):
    task, params, batch, found = leaving
    assert list(found) == ["transformer/layers/block_0/feed_forward/mean"]
    (means,) = found.values()
    assert means.shape == (4, 8) and (means.std(1) > 0).all()


@pytest.mark.parametrize("way", ["remat", "unstacked", "stages", "devices"])
def test_a_layer_leaves_the_same_however_it_is_computed(leaving, way):
    task, params, batch, expected = leaving
    if way == "remat":
        found = left(tiny.replace_model(task, remat="full"), params, batch)
    elif way == "unstacked":
        found = left(tiny.replace_model(task, unstacked=True), unstack_layers(params), batch)
    elif way == "stages":
        staged = replace(task, model=task.model.pipelined(Pipeline(2, 4)))
        found = left(staged, params, batch)
    else:
        mesh = make_mesh({"data": 4, "tensor": 2})
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
            found = left(task, whole, to_global(jax.device_get(batch), mesh))
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, atol=1e-6)


def test_an_auxiliary_loss_adds_up_over_micro_batches():
    config = tiny.config_dict(**LEAVING, objectives__contrastive__weight=0.0)
    config.objectives.calm = {"type": "toy_parts:Calm", "weight": 3.0, "noise": 0.0}
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    params, batch = tiny.params(task), tiny.batch(task, 8)
    optimizer = make_optimizer(Config(config.to_dict()).train, 10, params)
    key = jax.random.key(1)
    found = [
        jax.jit(lambda p, n=n: gradients(task, optimizer, p, batch, key, n))(params) for n in (1, 4)
    ]
    (total, whole, metrics), (again, parts, others) = found
    assert float(metrics["calm/loss"][1]) == float(others["calm/loss"][1]) == 8
    np.testing.assert_allclose(metrics["calm/loss"][0], others["calm/loss"][0], rtol=1e-5)
    np.testing.assert_allclose(total, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_treatment_that_is_not_finite_changes_nothing():
    off = {f"objectives__{name}__weight": 0.0 for name in ("captioning", "matching")}
    task, config = tiny.task(**off), Config(tiny.config_dict(**off).to_dict())
    params, batch = tiny.params(task), tiny.batch(task, 8)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    placement = param_shardings(task.abstract_params(), mesh)
    treatment = Breaking()
    make, shapes = initial_state(task.init, placement, 0, averaged=False, treatment=treatment)
    optimizer = make_optimizer(config.train, 10, params)
    abstract, enter = state_of_phase(shapes, optimizer, placement)
    step = make_train_step(task, optimizer, placement, abstract, treatment=treatment)
    with jax.set_mesh(mesh):
        state = enter(make())
        before = jax.device_get((state.params, state.treatment))
        state, _ = step(state, batch)
        assert int(state.bad_step) == 0
        after = jax.device_get((state.params, state.treatment))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_layers_that_run_twice_leave_twice():
    changes = {**LEAVING, "objectives__captioning__rule": "causal"}
    task = tiny.task(**changes)
    params, batch = tiny.params(task), tiny.batch(task, 8)
    (means,) = left(task, params, batch).values()
    assert means.shape == (4, 16)
    staged = replace(task, model=task.model.pipelined(Pipeline(2, 4)))
    (others,) = left(staged, params, batch).values()
    np.testing.assert_allclose(others, means, atol=1e-6)


def test_tokens_that_see_nothing_under_a_rule_get_zero():
    task = tiny.task(
        objectives__captioning__rule="toy_rules:BLIND", objectives__matching__weight=0.0
    )
    params, batch = tiny.params(task), tiny.batch(task, 3)
    losses = jax.jit(lambda p: task.metrics(p, batch, jax.random.key(0), deterministic=True))
    assert np.isfinite(losses(params)["captioning/loss"][0])


def test_a_block_from_outside():
    task = tiny.task(
        model__block="toy_parts:Doubled",
        model__block_options={"factor": 0.25, "unused": [1, 2]},
        objectives__captioning__rule="separate",
        objectives__matching__weight=0.0,
    )
    params, batch = tiny.params(task), tiny.batch(task, 3)
    assert list(params["transformer"]["layers"]["block_0"]) == ["map"]
    metrics = jax.jit(lambda p: task.metrics(p, batch, jax.random.key(0), deterministic=True))(
        params
    )
    assert np.isfinite(metrics["contrastive/loss"][0])
    assert task.model.options.block_options == (("factor", 0.25), ("unused", (1, 2)))
    hash(task.model.options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__block": "toy_parts:Nothing"}, "cannot import 'toy_parts:Nothing'"),
        (
            {"model__feed_forward_type": "expert"},
            "unknown feed-forward 'expert'. Did you mean 'experts'",
        ),
        (
            {"model__feed_forward_options": {"widen": 2}},
            "model.feed_forward_options.widen: FeedForward has no such option",
        ),
        (
            {
                "model__feed_forward_type": "toy_parts:Summing",
                "model__feed_forward_options": {"widen": "two"},
            },
            "model.feed_forward_options.widen='two': must be a int",
        ),
        (
            {
                "model__feed_forward_type": "toy_parts:Summing",
                "model__feed_forward_options": {"widden": 2},
            },
            "did you mean widen",
        ),
    ],
)
def test_wrong_parts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.task(**changes).abstract_params()


def test_a_scalar_cannot_be_left():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            sow_auxiliary(self, "mean", x.mean())
            return x

    with pytest.raises(ValueError, match="mean: what a layer leaves has a row for each"):
        Wrong().apply({}, jnp.ones((2, 3)), mutable=["auxiliary"])


def test_an_objective_has_its_fields_as_options_with_their_defaults():
    found = Length.from_config("length", {"type": "x:Length", "margin": 2, "weight": 0})
    assert found == Length("length", 0.0, "separate", 2.0)
    assert Length.from_config("length", {"type": "x:Length"}).margin == 0.5
    with pytest.raises(ValueError, match="objectives.length.margins: .*did you mean margin"):
        Length.from_config("length", {"margins": 2})
    with pytest.raises(ValueError, match="objectives.length.margin='far': must be a float"):
        Length.from_config("length", {"margin": "far"})
