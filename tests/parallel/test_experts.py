"""Experts on eight devices: the loss and gradient of one device, and what is sent."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.config import Config
from unified_mm.costs.collectives import collectives_of
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.tokens import Group, join_metadata, single_document
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import (
    BATCH,
    param_shardings,
    rule_items,
    to_global,
    without_names,
)
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.state import initial_state, state_of_phase
from unified_mm.training.step import gradients, make_train_step

ROWS, WIDTH = 16, 8


def layer(**own):
    """Boxed parameters of experts, a sum of their outputs in training, x and which is valid."""
    own = {"count": 4, "top_k": 2, "group": 2, "noise": 0.0, **own}
    options = TransformerOptions(
        WIDTH, 1, 2, 16, feed_forward_type="experts", feed_forward_options=tuple(own.items())
    )
    module = options.make_feed_forward(options=options)
    drawn = np.random.default_rng(0)
    parts = [
        single_document(jnp.asarray(drawn.random((ROWS, size)) < 0.8), Group(name, name, size))
        for name, size in {"image": 6, "text": 5}.items()
    ]
    metadata = join_metadata(parts)
    plan = plan_attention(options, MaskTable((View("text", "prefix"),)), metadata, metadata)
    x = jnp.asarray(drawn.normal(size=(ROWS, 11, WIDTH)).astype(np.float32))
    boxed = module.init(jax.random.key(0), x, plan)["params"]
    weights = jnp.asarray(drawn.normal(size=x.shape).astype(np.float32))

    def loss(params, x, valid):
        given = plan.replace(deterministic=False, valid=valid)
        y = module.apply({"params": params}, x, given)
        return (y * weights).sum()

    return boxed, loss, x, plan.valid


def compiled_on(sizes, boxed, loss, x, valid):
    """Programs on a mesh, without and with gradient, whose numbers are those of one device."""
    params = without_names(boxed)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x, valid)
    mesh = make_mesh(sizes)
    shardings = param_shardings(boxed, mesh).params
    rows = NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        placed = jax.device_put(params, shardings), *jax.device_put((x, valid), rows)
        sides = (shardings, rows, rows)
        forward = jax.jit(loss, in_shardings=sides).lower(*placed).compile()
        both = jax.jit(
            jax.value_and_grad(loss, (0, 1)),
            in_shardings=sides,
            out_shardings=(NamedSharding(mesh, P()), (shardings, rows)),
        ).lower(*placed)
        compiled = both.compile()
        found = compiled(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return forward, compiled


def test_two_exchanges_forward_four_with_gradient_and_the_same_numbers():
    built = layer(order="priority", capacity=1.0)
    params, mesh = without_names(built[0]), {"data": 2, "expert": 4}
    placed = param_shardings(built[0], make_mesh(mesh)).params
    assert placed["experts_all"]["up"]["kernel"].spec[0] == "expert"
    for program, exchanges in zip(compiled_on(mesh, *built), (2, 4), strict=True):
        sent = collectives_of(program.as_text())
        kinds = [each.kind for each in sent]
        assert kinds.count("all-to-all") == exchanges, kinds
        # Nothing else is sent but sums: of the loss, and of gradients of parameters.
        assert set(kinds) <= {"all-to-all", "all-reduce"}
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert all(each.bytes <= 2 * largest for each in sent if each.kind == "all-reduce")


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_without_drops_devices_compute_their_own_examples(sizes):
    """No token is sent: only sums of the loss and of gradients, and kernels that are divided."""
    built = layer(dropless=True)
    most = sum(leaf.nbytes for leaf in jax.tree.leaves(without_names(built[0])))
    forward, both = (collectives_of(p.as_text()) for p in compiled_on(sizes, *built))
    assert [each.bytes for each in forward if each.kind == "all-reduce"] == [4]
    sums, gathered = (
        sum(each.bytes for each in both if each.kind == kind)
        for kind in ("all-reduce", "all-gather")
    )
    assert sums <= 1.1 * most and gathered <= most * ("fsdp" in sizes)
    assert {each.kind for each in (*forward, *both)} <= {"all-reduce", "all-gather"}


CHANGES = {
    "model__feed_forward_type": "experts",
    "model__feed_forward_options": {"count": 4, "order": "priority", "capacity": 0.8},
    "model__layers": 1,
    "objectives__matching__weight": 0.0,
    "objectives__routing__weight": 1.0,
    "objectives__routing__global_entropy": 1.0,
    "objectives__routing__local_entropy": 1.0,
    "objectives__routing__least_share": 1.0,
    "train__warmup_steps": 0,
}


@pytest.mark.parametrize(
    ("sizes", "parts", "own"),
    [
        ({"data": 2, "expert": 4}, 2, {"group": 2, "order": "priority", "capacity": 0.8}),
        pytest.param(
            {"stage": 2, "data": 2, "fsdp": 2}, 1, {"dropless": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_one_loss_on_one_device_on_a_mesh_and_in_parts(sizes, parts, own):
    """With all losses of routers; stages are a pipeline."""
    given = {"count": 4, "noise": 0.0, **own}
    task = tiny.task(**{**CHANGES, "model__feed_forward_options": given, "model__layers": 2})
    params, batch = tiny.params(task), jax.device_get(tiny.batch(task, 32))
    config = Config(tiny.config_dict(**CHANGES).to_dict())

    def on(mesh, task, parts):
        optimizer = make_optimizer(config.train, 4, params)
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            placed = jax.device_put(params, param_shardings(task.abstract_params(), mesh).params)
            run = jax.jit(lambda p, b: gradients(task, optimizer, p, b, jax.random.key(1), parts))
            return jax.device_get(run(placed, to_global(batch, mesh)))

    loss, slopes, metrics = on(make_mesh({}, jax.devices()[:1]), task, 1)
    if "stage" in sizes:
        task = replace(task, model=task.model.pipelined(Pipeline(2, 2)))
    other, found, told = on(make_mesh(sizes), task, parts)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    np.testing.assert_allclose(told["routing/loss"], metrics["routing/loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def stepping(sizes, devices=None):
    """On a mesh: the first state, a step on a batch, and the shapes and shardings of a state."""
    task, mesh = tiny.task(**CHANGES), make_mesh(sizes, devices)
    batch = jax.device_get(tiny.batch(task, 8))
    placement = param_shardings(task.abstract_params(), mesh)
    make, shapes = initial_state(task.init, placement, 0, averaged=False)
    config = Config(tiny.config_dict(**CHANGES).to_dict())
    optimizer = make_optimizer(config.train, 4, shapes.params)
    abstract, enter = state_of_phase(shapes, optimizer, placement)
    step = make_train_step(task, optimizer, placement, abstract)

    def on(state):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            return step(enter(make()) if state is None else state, to_global(batch, mesh))

    return on, abstract


@pytest.mark.slow
def test_a_checkpoint_goes_on_to_the_same_bits_and_on_another_mesh(tmp_path):
    """Noise is drawn: it too is a function of seed and step."""
    step, abstract = stepping({"data": 2, "expert": 4})
    state, first = step(None)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    second, expected = jax.device_get(step(state))
    with Checkpoints(tmp_path) as checkpoints:
        again, found = jax.device_get(step(checkpoints.restore(abstract).state))
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)
    step, abstract = stepping({}, jax.devices()[:1])
    with Checkpoints(tmp_path) as checkpoints:
        _, other = step(checkpoints.restore(abstract).state)
    for name, values in expected.metrics.items():
        np.testing.assert_array_equal(found.metrics[name], values, err_msg=name)
        np.testing.assert_allclose(other.metrics[name], values, rtol=1e-4, err_msg=name)
    assert float(first.metrics["loss"][0]) != float(expected.metrics["loss"][0])
