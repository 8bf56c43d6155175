"""A stack in stages is the same stack: outputs, what it keeps, gradients, in all fusions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.nn.pipeline import Pipeline, run_pipeline

FUSIONS = {
    "early": {"objectives__matching__weight": 0.0},
    "early, matching": {"model__fusion": "early"},
    "gated_cross_attention": {
        "objectives__matching__weight": 0.0,
        "model__resampler__latents": 4,
        "model__cross__start": 0.3,
    },
}


@pytest.mark.parametrize(
    ("stages", "parts", "share"), [(1, 4, 0), (2, 2, 1 / 3), (4, 1, 3 / 4), (4, 12, 0.2)]
)
def test_the_bubble(stages, parts, share):
    pipeline = Pipeline(stages, parts)
    assert pipeline.bubble == pytest.approx(share)
    # Counted by hand: of so many stages and ticks, this many do something.
    assert 1 - pipeline.bubble == pytest.approx(stages * parts / (stages * pipeline.ticks))


@settings(max_examples=5, deadline=None)
@given(
    stages=st.sampled_from([1, 2, 3]),
    each=st.integers(1, 2),
    parts=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_every_example_meets_every_period_in_order_with_its_own_company(
    stages, each, parts, rows, seed
):
    rng = np.random.default_rng(seed)
    periods, batch = stages * each, parts * rows
    factor, shift = rng.normal(size=(2, periods))
    cached = rng.normal(size=(periods, batch, 2))
    x, beside = rng.normal(size=(batch, 3, 2)), rng.normal(size=(batch, 1, 1))
    expected, kept = x.copy(), []
    for layer in range(periods):
        expected = factor[layer] * expected + shift[layer] * beside + cached[layer][:, None]
        kept.append(expected.sum((1, 2)))

    def period(params, cached, x, own, number):
        factor, shift = params
        x = factor * x + shift * own + cached[:, None]
        return x, x.sum((1, 2))

    found = run_pipeline(
        Pipeline(stages, parts),
        period,
        (jnp.asarray(factor), jnp.asarray(shift)),
        *(jnp.asarray(each) for each in (cached, x, beside)),
    )
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], np.stack(kept), rtol=1e-4, atol=1e-4)


def losses(task, params, batch):
    def total(params):
        metrics = task.metrics(params, batch, jax.random.key(0), deterministic=False)
        return sum(metrics[f"{each.name}/loss"][0] for each in task.objectives)

    return jax.jit(jax.value_and_grad(total))(params)


@pytest.mark.parametrize(
    "fusion",
    ["early", *(pytest.param(name, marks=pytest.mark.slow) for name in FUSIONS if name != "early")],
)
def test_loss_and_gradients_are_those_of_the_stack(fusion):
    task = tiny.task(**{"model__fusion": fusion, **FUSIONS[fusion]})
    params, batch = tiny.params(task), tiny.batch(task, 4)
    staged = tiny.replace_model(task, pipeline=Pipeline(2, 2))
    value, gradient = losses(task, params, batch)
    found, staged_gradient = losses(staged, params, batch)
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(staged_gradient), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * size)


def test_dropout_in_stages_drops_and_is_drawn_anew_for_every_part_and_period():
    task = tiny.replace_model(tiny.task(model__dropout=0.5), pipeline=Pipeline(2, 2))
    params, batch = tiny.params(task), tiny.batch(task, 4)
    twice = jax.tree.map(lambda x: x.at[2:].set(x[:2]), batch)  # both parts hold the same rows

    def text(key):
        return task.model.apply(
            {"params": params},
            twice,
            task.objectives[0].views(),
            deterministic=False,
            method="encode",
            rngs={"dropout": key},
        )[task.objectives[0].name].text

    run = jax.jit(text)
    one, other = run(jax.random.key(0)), run(jax.random.key(1))
    assert not np.allclose(one, other)
    assert not np.allclose(one[:2], one[2:])


@pytest.mark.parametrize(
    ("pipeline", "named"),
    [
        (Pipeline(3, 2), "2 periods of layers are not divided by mesh.stage=3"),
        (Pipeline(2, 3), "a batch of 4 is not divided into 3 parts"),
    ],
)
def test_what_stages_do_not_divide_is_refused(pipeline, named):
    task = tiny.task(objectives__matching__weight=0.0)
    params, batch = tiny.params(task), tiny.batch(task, 4)
    staged = tiny.replace_model(task, pipeline=pipeline)
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(lambda p: losses(staged, p, batch), params)
