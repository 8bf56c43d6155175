"""The contrastive head, and what contrast does not count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.default_config import default_config
from unified_mm.nn.pooling import AttentionPool, pooled
from unified_mm.objectives.contrastive import Contrastive, counted_rows
from unified_mm.parallel.sharding import without_names
from unified_mm.task import build_task

DEFAULTS = default_config().objectives.contrastive.to_dict()
OPTIONS = {**DEFAULTS, "width": 8}


def test_the_head_pools_what_is_valid_projects_and_scales_to_unit_length():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 6)).astype(np.float32)
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    head = Contrastive("c", width=5).head()
    kernel = {name: rng.normal(size=(6, 5)).astype(np.float32) for name in ("image", "text")}
    params = {f"project_{name}": {"kernel": kernel[name]} for name in kernel}
    params["log_scale"] = jnp.float32(1.5)
    for name in kernel:
        found = head.apply({"params": params}, name, jnp.asarray(x), jnp.asarray(valid))
        for row in range(2):
            y = x[row][valid[row]].mean(0) @ kernel[name]
            np.testing.assert_allclose(found[row], y / np.linalg.norm(y), atol=1e-5)
        assert (np.asarray(found[2]) == 0).all()
    scale, bias = head.apply({"params": params}, method="scale_and_bias")
    assert float(scale) == pytest.approx(np.exp(1.5)) and float(bias) == 0
    params["log_scale"] = jnp.float32(9.0)
    scale, _ = head.apply({"params": params}, method="scale_and_bias")
    assert float(scale) == pytest.approx(100, rel=1e-3)  # CLIP's bound


@pytest.mark.parametrize("sigmoid, scale, bias", [(False, 1 / 0.07, 0), (True, 10, -10)])
def test_the_temperature_starts_where_the_paper_starts(sigmoid, scale, bias):
    loss = "sigmoid" if sigmoid else "softmax"
    head = Contrastive("c", loss=loss, between="text", width=5).head()
    ones = jnp.ones((1, 2, 6)), jnp.ones((1, 2), bool)
    params = without_names(head.init(jax.random.key(0), "text", *ones))
    found = head.apply(params, method="scale_and_bias")
    assert [float(x) for x in found] == pytest.approx([scale, bias], rel=1e-3)


def test_a_pair_is_an_image_and_a_text_that_describes_it():
    batch = {
        "image": {"present": jnp.array([True, True, False, True])},
        "text": {
            "present": jnp.array([True, False, True, True]),
            "prompted": jnp.array([False, False, False, True]),
        },
    }
    counts = np.asarray(counted_rows(batch, ("image", "text")))
    np.testing.assert_array_equal(counts.all(1), [True, False, False, False])


def test_above_its_bound_the_temperature_stops_and_can_come_back():
    head = Contrastive("c", between="text", width=5).head()

    def scale(log_scale):
        return head.apply({"params": {"log_scale": log_scale}}, method="scale_and_bias")[0]

    assert float(scale(6.0)) == pytest.approx(100, rel=1e-4)
    assert float(jax.grad(scale)(6.0)) == pytest.approx(100, rel=1e-4)


def test_pools_take_the_tokens_they_name():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    valid = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(pooled("first", x, valid), x[:, 0])
    np.testing.assert_array_equal(pooled("last", x, valid), [x[0, 1], x[1, 3]])
    np.testing.assert_allclose(pooled("mean", x, valid), [x[0, :2].mean(0), x[1].mean(0)])


def test_the_attention_pool_sees_what_is_valid_alone():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    valid = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    pool = AttentionPool(2, 6)
    params = without_names(jax.jit(pool.init)(jax.random.key(0), x, valid))
    apply = jax.jit(pool.apply)
    found = apply(params, x, valid)
    assert found.shape == (2, 8)
    poisoned = jnp.where(valid[..., None], x, 1e4)
    np.testing.assert_array_equal(found, apply(params, poisoned, valid))
    moved = apply(params, x.at[0, 1].add(1.0), valid)
    assert (moved[0] != found[0]).any() and (moved[1] == found[1]).all()


def test_wrong_options_are_refused():
    for name, value, message in (
        ("pool", "median", "unknown objectives.c.pool 'median'"),
        ("text_projection", "cubic", "objectives.c.text_projection='cubic': must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Contrastive.from_config("c", {**OPTIONS, name: value})
    with pytest.raises(ValueError, match="unknown objectives.c.loss 'hinge'. Built in: sigmoid, s"):
        Contrastive.from_config("c", {**OPTIONS, "loss": "hinge"})
    for rule in ("joint", "prefix", "causal"):
        with pytest.raises(ValueError, match=f"rule='{rule}' lets image and text see each other"):
            Contrastive.from_config("c", {**OPTIONS, "rule": rule})


def test_the_scale_is_unbounded_where_that_is_asked_for():
    head = Contrastive("c", loss="sigmoid", between="text", width=5, bound_scale=False).head()
    params = {"log_scale": jnp.float32(4.8), "bias": jnp.float32(-16.0)}
    scale, _ = head.apply({"params": params}, method="scale_and_bias")
    assert float(scale) == pytest.approx(np.exp(4.8))


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_text_alone_is_held_against_itself_read_again_with_other_dropout(fusion):
    config = tiny.config_dict(
        model__fusion=fusion,
        model__dropout=0.5,
        objectives__contrastive__between="text",
        objectives__captioning__weight=0.0,
        objectives__matching__weight=0.0,
    )
    del config.model.modalities["image"]
    task = build_task(Config(config.to_dict()), tiny.tokenizer())
    params = tiny.params(task)
    assert "project_image" not in params["heads_contrastive"]
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 200, (4, 12)).astype(np.int32)
    ones = np.ones(ids.shape, bool)
    rows = np.ones(4, bool)
    text = {"ids": ids, "valid": ones, "scored": ones, "present": rows, "prompted": ~rows}
    batch = {"text": jax.tree.map(jnp.asarray, text)}

    @jax.jit
    def metrics(params):
        key = jax.random.key(0)
        return [task.metrics(params, batch, key, deterministic=each) for each in (True, False)]

    still, moved = (each["contrastive/loss"] for each in metrics(params))
    assert np.isfinite(still[0]) and np.isfinite(moved[0]) and moved[0] != still[0]
    _, again = task.objectives[0].views()

    def read(model, batch):
        views = task.objectives[0].views()
        encoded = model.encode(batch, views, deterministic=False)
        return [encoded[view.name].text for view in views]

    apply = jax.jit(partial(task.model.apply, method=read))
    first, second = apply({"params": params}, batch, rngs={"dropout": jax.random.key(1)})
    assert again.name == "contrastive_again" and not np.allclose(first, second)
