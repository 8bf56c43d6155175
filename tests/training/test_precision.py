"""Half-precision training: the loss's scale, steps that are skipped, moments in bfloat16."""

import functools
import math
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.config import Config
from unified_mm.costs.flops import equations
from unified_mm.nn.transformer import rounded
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import (
    param_shardings,
    path_of,
    rule_items,
    to_global,
    without_names,
)
from unified_mm.training.optimizer import kept_as, make_optimizer, rounded_at_random
from unified_mm.training.state import LARGEST, START, LossScale, initial_state, state_of_phase
from unified_mm.training.step import gradients, make_train_step, rounded_stacks

CHANGES = {
    "model__dtype": "float16",
    "model__layers": 1,
    "objectives__matching__weight": 0.0,
    "train__warmup_steps": 0,
}


@settings(deadline=None, max_examples=20)
@given(finite=st.lists(st.booleans(), max_size=40), patience=st.integers(1, 5))
def test_the_scale_halves_on_overflow_and_doubles_after_patience(finite, patience):
    found = LossScale.start(patience)
    scale, good = START, 0
    for step_is_finite in finite:
        found = found.after(jnp.array(step_is_finite))
        good = good + 1 if step_is_finite else 0
        if not step_is_finite:
            scale = max(scale / 2, 1.0)
        elif good == patience:
            scale, good = min(scale * 2, LARGEST), 0
        assert (float(found.scale), int(found.good)) == (scale, good)
    assert bool(found.can_fall) == (scale > 1)


@pytest.fixture(scope="module")
def stepper():
    """A half-precision run on one device: its first state, its step, a batch."""
    task = tiny.task(**CHANGES)
    options = Config(tiny.config_dict(**CHANGES).to_dict()).train
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        placement = param_shardings(task.abstract_params(), mesh)
        first, shapes = initial_state(task.init, placement, 0, averaged=True, scale_patience=3)
        optimizer = make_optimizer(options, 4, shapes.params)
        abstract, enter = state_of_phase(shapes, optimizer, placement)
        step = make_train_step(task, optimizer, placement, abstract, ema_decay=0.5)
        batch = jax.tree.map(np.array, tiny.batch(task, 4))
        yield lambda: enter(first()), lambda s, b: step(s, to_global(b, mesh)), batch


def test_an_overflow_is_skipped_and_training_goes_on(stepper):
    make, step, batch = stepper
    poisoned = jax.tree.map(np.copy, batch)
    poisoned["image"]["pixels"][1] = np.inf
    state = make()
    kept = jax.device_get((state.params, state.optimizer, state.average))
    state, measured = step(state, poisoned)
    found = jax.device_get((state.params, state.optimizer, state.average))
    jax.tree.map(np.testing.assert_array_equal, found, kept)
    assert float(state.loss_scale.scale) == START / 2 and int(state.bad_step) == -1
    assert int(state.step) == 1
    told = {name: (float(a), float(b)) for name, (a, b) in measured.metrics.items()}
    assert told["skipped"] == (1, 1) and told["loss_scale"] == (START, 1)
    assert told["loss"] == (0, 0)  # it has no part in an interval's mean
    for _ in range(3):
        state, measured = step(state, batch)
    assert float(state.loss_scale.scale) == START and int(state.bad_step) == -1
    assert np.isfinite(float(measured.metrics["loss"][0])) and measured.metrics["skipped"][0] == 0
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(jax.device_get(state.params)), jax.tree.leaves(kept[0]))
    ]
    assert max(moved) > 1e-4


def test_what_no_smaller_scale_can_mend_is_a_bad_step(stepper):
    make, step, batch = stepper
    poisoned = jax.tree.map(np.copy, batch)
    poisoned["image"]["pixels"][1] = np.nan
    state = make()
    for _ in range(int(np.log2(START))):
        state, _ = step(state, poisoned)
    assert float(state.loss_scale.scale) == 1 and int(state.bad_step) == -1
    state, measured = step(state, poisoned)
    assert int(measured.bad_step) == int(np.log2(START))


def test_the_scale_saves_gradients_that_half_precision_loses():
    """Against float32, with a loss so small that half-precision gradients are none."""
    half, whole = tiny.task(**CHANGES), tiny.task(**CHANGES | {"model__dtype": "float32"})
    params, batch = tiny.params(whole), tiny.batch(whole, 4)
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)

    def compiled(task):
        small = tuple(replace(each, weight=2.0**-24) for each in task.objectives)
        task, key = replace(task, objectives=small), jax.random.key(0)

        @jax.jit
        def run(params, scale):
            return gradients(task, optimizer, params, batch, key, 1, scale=scale)[1]

        def vector(scale):
            leaves = jax.tree.leaves(run(params, jnp.float32(scale)))
            return np.concatenate([np.ravel(leaf) for leaf in leaves])

        return vector

    expected, found = compiled(whole)(1.0), compiled(half)

    def error(scale):
        return np.linalg.norm(found(scale) - expected) / np.linalg.norm(expected)

    assert error(2.0**24) < 0.02 < 0.5 < error(1.0)


def test_moments_are_kept_as_bfloat16_and_worked_on_in_float32():
    adam = optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-8)
    transform = kept_as(adam, "bfloat16")
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros(500)}
    state = transform.init(params)
    mu, nu = np.zeros(500, np.float32), np.zeros(500, np.float32)
    for step in range(1, 6):
        g = rng.normal(size=500).astype(np.float32)
        updates, state = transform.update({"w": jnp.asarray(g)}, state)
        mu, nu = np.float32(0.9) * mu + np.float32(0.1) * g, 0.98 * nu + 0.02 * g * g
        expected = (mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.98**step)) + 1e-8)
        np.testing.assert_allclose(updates["w"], expected, rtol=2e-3, atol=1e-5)
        mu, nu = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (mu, nu))
    sizes = {leaf.dtype.name: leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert sizes == {"bfloat16": 1000} and state.count.dtype == jnp.int32
    with pytest.raises(ValueError, match="train.moments_dtype='float16': must be one of float32"):
        config = tiny.config_dict(train__moments_dtype="float16")
        make_optimizer(Config(config.to_dict()).train, 4, params)


def test_the_second_moment_falls_again_in_bfloat16():
    """After a hundred large gradients, thousands of small ones, as float32 has them."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    params = {"w": jnp.zeros(64)}
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6000, 64)).astype(np.float32)
    gradients[:100] *= 10

    @functools.partial(jax.jit, static_argnames=("dtype", "rounding"))
    def second_moment(dtype, rounding):
        transform = kept_as(adam, dtype, rounding)

        def step(state, gradient):
            return transform.update({"w": gradient}, state)[1], None

        state, _ = jax.lax.scan(step, transform.init(params), jnp.asarray(gradients))
        return state.nu["w"].astype(jnp.float32)

    exact = np.asarray(second_moment("float32", "nearest"))
    nearest = np.asarray(second_moment("bfloat16", "nearest"))
    ratio = np.asarray(second_moment("bfloat16", "stochastic")) / exact
    # So what runs of before have stays, and is said.
    assert np.median(nearest / exact) > 4
    assert abs(ratio.mean() - 1) < 0.02 and np.abs(ratio - 1).max() < 0.2


def test_rounding_at_random_is_right_on_average_and_takes_neighbours_alone():
    x = np.array([1.0, 1.0 + 2**-9, -3.001, 1e-30, 0.0, np.inf, -np.inf, np.nan], np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: rounded_at_random(jnp.asarray(x), key)))(keys)
    drawn = np.asarray(drawn.astype(jnp.float32))
    np.testing.assert_array_equal(drawn[0, [0, 4, 5, 6, 7]], x[[0, 4, 5, 6, 7]])
    finite = drawn[:, :4]
    assert all(len(np.unique(column)) <= 2 for column in finite.T)
    np.testing.assert_allclose(finite.mean(0), x[:4], rtol=3e-4)


def test_stochastic_rounding_of_float32_is_refused():
    config = tiny.config_dict(train__moments_rounding="stochastic")
    with pytest.raises(ValueError, match="is for train.moments_dtype='bfloat16'"):
        make_optimizer(Config(config.to_dict()).train, 4, {"a": {"kernel": jnp.zeros(5)}})


EXPERTS = {"feed_forward_type": "experts", "feed_forward_options": {"count": 4, "noise": 0.0}}
DROPLESS = {
    "feed_forward_type": "experts",
    "feed_forward_options": {"count": 4, "noise": 0.0, "dropless": True},
}
NAMES = {"query", "value", "up", "down"}
GATED = {"fusion": "gated_cross_attention", "cross__every": 1}
CASES = [
    (DROPLESS, {"data": 2}, "query value"),
    ({}, {"data": 1}, "down query up value"),
    ({}, {"data": 1, "fsdp": 2, "tensor": 2}, "down query up value"),
    ({"train": 2}, {"data": 2}, "down query up value"),
    (GATED, {"data": 1}, "down query up value"),
    (EXPERTS, {"data": 1}, "query value"),  # of experts each device's share is added up
    ({"separate_attention": True}, {"data": 1}, "down up"),
]


def halves(options, params, placement):
    """The paths of a stack's parameters that are rounded."""
    layers, shardings = (each["transformer"]["layers"] for each in (params, placement.params))
    shapes = jax.eval_shape(lambda layers: rounded(options, layers, shardings), layers)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {path_of(path) for path, leaf in leaves if leaf.dtype == jnp.bfloat16}


@pytest.mark.parametrize("changes, mesh, half", CASES, ids=str)
def test_gradients_of_all_layers_are_as_exact_as_those_of_each(changes, mesh, half):
    """Kernels are rounded once for all layers, where each has one gradient."""
    parts = changes.get("train", 1)
    model = {f"model__{name}": value for name, value in changes.items() if name != "train"}
    task = tiny.task(**CHANGES | {"model__dtype": "bfloat16", "model__layers": 2, **model})
    params, batch, key = tiny.params(task), tiny.batch(task, 4), jax.random.key(0)
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)
    devices = jax.devices()[: math.prod(mesh.values())]
    mesh = make_mesh(mesh, devices)
    placement = param_shardings(task.abstract_params(), mesh)

    params = jax.device_put(jax.tree.map(np.asarray, params), placement.params)
    batch = to_global(batch, mesh)

    def gradient(params, placement):
        return gradients(task, optimizer, params, batch, key, parts, placement=placement)[1]

    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        found = halves(task.model.options, params, placement)
        names = {name for path in found for name in path.split("/")} & NAMES
        assert " ".join(sorted(names)) == half
        assert all(path.endswith("/kernel") for path in found)
        found, expected = (
            jax.tree.leaves(jax.jit(partial(gradient, placement=each))(params))
            for each in (placement, None)
        )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.01 * np.abs(other).max())


def test_the_gradients_of_all_layers_take_half_of_the_memory():
    changes = CHANGES | {"model__dtype": "bfloat16", "model__layers": 2}
    task = tiny.task(**changes)
    params, batch, key = tiny.params(task), tiny.batch(task, 4), jax.random.key(0)
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)
    placement = param_shardings(task.abstract_params(), make_mesh({}, jax.devices()[:1]))
    other = task.model.options.changed({"block": "toy_parts:Doubled"})
    assert not halves(other, params, placement)  # what it would round is not known

    def kinds(placement):
        """The types of what the scan of the backward pass hands out, by shape."""
        traced = jax.make_jaxpr(
            lambda params: gradients(task, optimizer, params, batch, key, 1, placement=placement)[1]
        )(params)
        found = {}
        for equation in equations(traced.jaxpr):
            if equation.primitive.name == "scan" and equation.params["reverse"]:
                for var in equation.outvars:
                    found.setdefault(var.aval.shape, set()).add(str(var.aval.dtype))
        return found

    assert kinds(placement)[2, 16, 2, 8] == kinds(placement)[2, 16, 32] == {"bfloat16"}
    assert kinds(None)[2, 16, 2, 8] == kinds(None)[2, 16, 32] == {"float32"}


def test_a_stack_that_nothing_uses_has_nothing_to_round():
    """Classes of pictures by a tower alone: the language model has no parameters."""
    changes = {"model__dtype": "bfloat16", "model__fusion": "late"}
    task = tiny.task(**CHANGES | changes | {"objectives__captioning__weight": 0.0})
    mesh = make_mesh({}, jax.devices()[:1])
    shapes = task.abstract_params()
    placement = param_shardings(shapes, mesh)
    alone, shardings = (
        {"towers_image": each["towers_image"]} for each in (without_names(shapes), placement.params)
    )
    found = jax.eval_shape(lambda params: rounded_stacks(task, params, shardings), alone)
    assert list(found) == ["towers_image"]
    block = found["towers_image"]["layers"]["block_0"]
    assert block["feed_forward"]["mlp"]["shared"]["up"]["kernel"].dtype == jnp.bfloat16
