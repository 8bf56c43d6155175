"""One step: micro-batches, the moving average, and what a NaN may not touch."""

import contextlib
from operator import itemgetter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.objectives.objective import mean
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import (
    from_parts,
    into_parts,
    param_shardings,
    rule_items,
    to_global,
)
from unified_mm.task import build_task
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.state import evaluation_params, initial_state, state_of_phase
from unified_mm.training.step import decay_at, gradients, make_train_step

DECAY = 0.75
CHANGES = {
    "train__warmup_steps": 0,
    "objectives__contrastive__weight": 0.0,
    "objectives__matching__weight": 0.0,
}


@pytest.fixture(scope="module")
def task():
    return tiny.task(**CHANGES)


@contextlib.contextmanager
def stepping(task, **options):
    """A first state's maker, and the step on one device with a moving average."""
    config = Config(tiny.config_dict(train__warmup_steps=0).to_dict())
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        placement = param_shardings(task.abstract_params(), mesh)
        first, shapes = initial_state(task.init, placement, 0, averaged=True)
        optimizer = make_optimizer(config.train, 4, shapes.params)
        abstract, enter = state_of_phase(shapes, optimizer, placement)
        step = make_train_step(task, optimizer, placement, abstract, ema_decay=DECAY, **options)
        make = lambda: enter(first())  # noqa: E731
        yield make, lambda state, batch: step(state, to_global(batch, mesh)), optimizer


@pytest.fixture(scope="module")
def stepper(task):
    with stepping(task) as made:
        yield made


@pytest.fixture(scope="module")
def whole(task):
    """Of the parameters and a batch: loss, gradient and metrics, compiled for a batch as one."""
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, tiny.params(task))
    key = jax.random.key(1)
    return jax.jit(lambda params, batch: gradients(task, optimizer, params, batch, key, 1))


def uneven(task):
    """Six examples whose scored tokens are few in one micro-batch and many in another."""
    batch = jax.tree.map(np.array, tiny.batch(task, 6, seed=5))
    batch["text"]["scored"][[0, 3]] &= np.arange(12) == 1
    batch["text"]["present"][3] = False
    return batch


def test_micro_batches_are_the_whole_batch_where_they_score_unequally(task, whole):
    params = tiny.params(task)
    batch = jax.tree.map(jnp.asarray, uneven(task))
    key = jax.random.key(1)
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)
    total, expected, metrics = whole(params, batch)
    for parts in (2, 3):
        counts = np.asarray(batch["text"]["scored"] & batch["text"]["present"][:, None])
        per_part = counts[:, 1:].sum(1).reshape(-1, parts).sum(0)
        assert len(set(per_part)) == parts  # else the test would show nothing
    found_total, found, found_pairs = jax.jit(
        lambda p: gradients(task, optimizer, p, batch, key, 3)
    )(params)
    np.testing.assert_allclose(found_total, total, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(found_pairs[name], metrics[name], rtol=1e-5)
    for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)


def undivided(task, optimizer, batch, key, parts):
    """What accumulation must amount to: all parts in one differentiated program."""
    rows = jax.tree.map(lambda x: into_parts(x, parts), batch)
    keys = jax.random.split(key, parts)

    def loss(params):
        each = [
            task.metrics_and_embedded(
                params, jax.tree.map(itemgetter(i), rows), keys[i], deterministic=False
            )
            for i in range(parts)
        ]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
        compared = task.compared(params, jax.tree.map(from_parts, stacked[1]))
        summed = jax.tree.map(lambda x: x.sum(0), stacked[0]) | compared
        return sum(o.weight * mean(summed[f"{o.name}/loss"]) for o in task.objectives), summed

    return lambda params: jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "objectives__contrastive__loss": "sigmoid",
            "objectives__captioning__weight": 0.0,
            "model__dropout": 0.2,
        },
        pytest.param(
            {"objectives__contrastive__chunk": 2, "objectives__matching__weight": 1.0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sigmoid, dropout", "softmax in chunks, matching"],
)
def test_contrast_is_among_the_whole_batch_in_micro_batches_too(changes):
    task = tiny.task(**({"objectives__matching__weight": 0.0} | changes))
    params = tiny.params(task)
    batch = jax.tree.map(jnp.asarray, uneven(task))
    batch["text"]["prompted"] = batch["text"]["prompted"].at[4].set(True)
    key = jax.random.key(3)
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)
    (total, metrics), whole = jax.jit(undivided(task, optimizer, batch, key, 2))(params)
    found_total, found, found_pairs = jax.jit(
        lambda p: gradients(task, optimizer, p, batch, key, 2, scale=64.0)
    )(params)
    np.testing.assert_allclose(found_total, total, rtol=1e-5)
    assert float(metrics["contrastive/loss"][1]) == 4  # not prompted, with its text, of six
    for name in metrics:
        np.testing.assert_allclose(found_pairs[name], metrics[name], rtol=1e-5, err_msg=name)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for one, many in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5 * size)


def test_examples_of_one_record_are_told_over_micro_batches():
    """The loss of twice as large a batch, each example there twice, is that of the batch itself."""
    changes = {**CHANGES, "objectives__captioning__weight": 0.0}
    changes["objectives__contrastive__weight"] = 1.0
    task = tiny.task(**changes, objectives__contrastive__same_item_negatives=False)
    params = tiny.params(task)
    optimizer = make_optimizer(Config(tiny.config_dict().to_dict()).train, 4, params)
    once = tiny.batch(task, 4, seed=5)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), once)
    records = jnp.array([0, 1, 2, 3, 0, 1, 2, 3], jnp.int32)
    told = {name: {**each, "record": records} for name, each in twice.items()}
    # The texts of the second half are others of the same images.
    told["text"]["ids"] = told["text"]["ids"].at[4:, 1].add(1)

    def total(batch, parts):
        run = jax.jit(lambda p: gradients(task, optimizer, p, batch, jax.random.key(0), parts))
        return run(params)

    plain, whole = total(told, 1)[:2]
    for loss, gradient in (total(told, 4)[:2],):
        np.testing.assert_allclose(loss, plain, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, whole
        )

    def vectors(model):
        head = task.objectives[0]
        return [head.embed(model, told, of) for of in ("image", "text")]

    read = jax.jit(lambda p: task.model.apply({"params": p}, method=vectors))
    images, texts = read(params)
    scale = float(jnp.exp(params["heads_contrastive"]["log_scale"]))
    logits = scale * np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
    same = np.asarray(records)[:, None] == np.asarray(records)
    logits = np.where(same & ~np.eye(8, dtype=bool), -np.inf, logits)
    losses = [np.log(np.exp(logits).sum(axis)) - logits.diagonal() for axis in (0, 1)]
    assert float(plain) == pytest.approx(0.5 * sum(losses).mean(), rel=1e-4)


def test_the_gradient_is_that_of_the_mean_loss(task, whole):
    """Along a random direction: the slope of the loss, by finite differences."""
    params = tiny.params(task)
    batch = jax.tree.map(jnp.asarray, uneven(task))
    key = jax.random.key(1)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)

    @jax.jit
    def loss(size):
        moved = jax.tree.map(lambda x, d: x + size * d, params, direction)
        return mean(task.metrics(moved, batch, key, deterministic=True)["captioning/loss"])

    _, gradient, _ = whole(params, batch)
    products = jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradient, direction)
    slope = (float(loss(1e-3)) - float(loss(-1e-3))) / 2e-3
    assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=2e-2)


def test_a_step_counts_averages_and_tells(task, stepper):
    make, step, optimizer = stepper
    state = make()
    before = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.average), before)
    batch = uneven(task)
    average = before
    for number in range(2):
        state, measured = step(state, batch)
        after = jax.device_get(state.params)
        average = jax.tree.map(lambda a, p: DECAY * a + (1 - DECAY) * p, average, after)
        for found, expected in zip(
            jax.tree.leaves(state.average), jax.tree.leaves(average), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert int(state.step) == number + 1 and int(state.bad_step) == -1
        rate = float(optimizer.schedule(number))
        assert float(measured.learning_rate) == pytest.approx(rate, rel=1e-5)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before))]
    assert max(moved) > 1e-4
    assert evaluation_params(state) is state.average
    assert float(measured.metrics["loss"][0]) == pytest.approx(
        float(mean(measured.metrics["captioning/loss"])), rel=1e-6
    )


def test_a_warmed_up_average_holds_nothing_of_the_start():
    """Of 0.9999 a thousand steps leave 0.905 of the random start, of the warm-up nothing."""
    steps = np.arange(1000)
    decays = np.asarray(jax.vmap(lambda step: decay_at(step, 0.9999))(steps), np.float64)
    np.testing.assert_allclose(decays, (1 + steps) / (10 + steps), rtol=1e-6)
    assert np.prod(decays) < 1e-10 and 0.9999 ** len(steps) > 0.9
    assert float(decay_at(10**6, 0.99)) == pytest.approx(0.99)


def test_a_step_warms_its_average_up():
    """Of a model of texts alone, whose step is compiled sooner."""
    off = {f"objectives__{name}__weight": 0.0 for name in ("captioning", "matching")}
    config = tiny.config_dict(**off, objectives__contrastive__between="text")
    del config.model.modalities["image"]
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    text = {"text": jax.tree.map(np.asarray, tiny.batch(tiny.task(), 6)["text"])}
    with stepping(task, ema_warmup=True) as (make, step, _):
        state = make()
        average = jax.device_get(state.params)
        for decay in (1 / 10, 2 / 11):
            state, _ = step(state, text)
            params = jax.device_get(state.params)
            average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
            for one, other in zip(
                jax.tree.leaves(state.average), jax.tree.leaves(average), strict=True
            ):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    lone = Config(tiny.config_dict(train__ema_warmup=True).to_dict()).train
    with pytest.raises(ValueError, match="needs train.ema_decay above 0"):
        make_optimizer(lone, 4, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_leaves_all_it_learned_untouched_and_is_named(task, stepper, bad):
    make, step, _ = stepper
    batch = uneven(task)
    state, _ = step(make(), batch)
    kept = jax.device_get((state.params, state.optimizer, state.average))
    poisoned = jax.tree.map(np.copy, batch)
    poisoned["image"]["pixels"][1] = bad
    state, measured = step(state, poisoned)
    assert int(state.bad_step) == int(measured.bad_step) == 1 and int(state.step) == 2
    # Nothing is learned from there on, whatever comes; the first bad step stays named.
    for following in (batch, poisoned):
        state, measured = step(state, following)
        assert int(measured.bad_step) == 1
    found = jax.device_get((state.params, state.optimizer, state.average))
    jax.tree.map(np.testing.assert_array_equal, found, kept)
    assert int(state.step) == 4
