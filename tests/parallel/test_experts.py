"""Experts on eight devices: the loss and gradient of one device, and what is sent."""

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
from unified_mm.training.step import make_train_step

ROWS, WIDTH = 16, 8


@pytest.fixture(scope="module")
def layer():
    """A layer with experts in training, boxed parameters, a sum of its outputs, x and its plan."""
    own = {"count": 4, "top_k": 2, "group": 2, "order": "priority", "noise": 0.0, "capacity": 1.0}
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


def test_two_exchanges_forward_four_with_gradient_and_the_same_numbers(layer):
    boxed, loss, x, valid = layer
    params = without_names(boxed)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x, valid)
    mesh = make_mesh({"data": 2, "expert": 4})
    shardings = param_shardings(boxed, mesh).params
    rows = NamedSharding(mesh, BATCH)
    assert shardings["experts_all"]["up"]["kernel"].spec[0] == "expert"
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
    for program, exchanges in ((forward, 2), (compiled, 4)):
        sent = collectives_of(program.as_text())
        kinds = [each.kind for each in sent]
        assert kinds.count("all-to-all") == exchanges, kinds
        # Nothing else is sent but sums: of the loss, and of gradients of parameters.
        assert set(kinds) <= {"all-to-all", "all-reduce"}
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert all(each.bytes <= 2 * largest for each in sent if each.kind == "all-reduce")


CHANGES = {
    "model__feed_forward_type": "experts",
    "model__feed_forward_options": {"count": 4, "order": "priority", "capacity": 0.8},
    "model__layers": 1,
    "objectives__matching__weight": 0.0,
    "objectives__routing__weight": 1.0,
    "train__warmup_steps": 0,
}


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
