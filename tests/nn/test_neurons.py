"""Few neurons a picture: the most active, named beforehand, gathered; and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.neurons import Neurons, highest
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.quantized import Quantized
from unified_mm.nn.tokens import Group, join_metadata, offset_positions, single_document
from unified_mm.parallel.sharding import path_of

VIEW = View("captioning", "prefix", autoregressive=True)
DENSE = {"model__feed_forward_type": "dense", "model__feed_forward_options": {},
         "objectives__neurons__weight": 0.0}  # fmt: skip


def task(share=0.25, **changes):
    few = {
        "model__feed_forward_type": "neurons",
        "model__feed_forward_options": {"share": share, "rank": 4},
        "model__activation": "relu",
        "objectives__neurons__weight": 1.0,
    }
    return tiny.task(**{**few, **changes})


@pytest.fixture(scope="module")
def few():
    built = task()
    return built, tiny.params(built), tiny.batch(built, 3)


def losses(task, params, batch):
    """The metrics of all objectives, and the gradient of the sum of their losses."""

    def total(params):
        found = task.metrics(params, batch, jax.random.key(0), deterministic=True)
        return sum(x for name, (x, _) in found.items() if name.endswith("/loss")), found

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return found, gradient


def without_predictors(tree):
    if not isinstance(tree, dict):
        return tree
    return {k: without_predictors(x) for k, x in tree.items() if not k.startswith("of_")}


def outputs(task, params, batch):
    apply = task.model.apply
    return jax.jit(lambda params, batch: apply({"params": params}, batch, method=read))(
        params, batch
    )


def read(model, batch):
    found = model.encode(batch, (VIEW,))["captioning"]
    return found.text, found.outputs["image"]


def alone(o, params, x, valid):
    """One feed-forward of three patches and two tokens of a text."""
    metadata = join_metadata(
        [
            single_document(valid[:, :3], Group("image", "image", 3)),
            offset_positions(single_document(valid[:, 3:], Group("t", "text", 2)), {}, 3),
        ]
    )
    plan = plan_attention(o, MaskTable((View("t", "prefix"),)), metadata, metadata)
    return Neurons(o, 0.4).apply({"params": params}, x, plan)


@pytest.mark.parametrize("gated", [False, True])
def test_the_most_active_are_kept_and_what_is_named_is_gathered(gated):
    """Against a loop over the examples in NumPy, which knows no masks and no rows."""
    rng = np.random.default_rng(0)
    o = TransformerOptions(6, 1, 1, 10, activation="relu", gated_feed_forward=gated)
    shapes = {"up": (6, 10), "down": (10, 6)} | ({"gate": (6, 10)} if gated else {})
    maps = {
        name: {"kernel": rng.normal(size=s).astype("f"), "bias": rng.normal(size=s[1]).astype("f")}
        for name, s in shapes.items()
    }
    predictor = {
        name: {"kernel": rng.normal(size=s).astype("f"), "bias": rng.normal(size=s[1]).astype("f")}
        for name, s in {"narrow": (6, 32), "wide": (32, 10)}.items()
    }
    params = {"mlp": {"shared": maps, "of_image": predictor}}
    x = rng.normal(size=(3, 5, 6)).astype("f")
    valid = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 1]], bool)

    def apply(name, x):
        return x @ maps[name]["kernel"] + maps[name]["bias"]

    for gathered in (False, True):
        options = o.changed({"gathered": gathered})
        found = alone(options, params, jnp.asarray(x), jnp.asarray(valid))
        for row in range(3):
            hidden = np.maximum(apply("gate" if gated else "up", x[row]), 0)
            hidden = hidden * apply("up", x[row]) if gated else hidden
            activity = np.abs(hidden[:3][valid[row, :3]]).sum(0)
            if gathered:
                mean = x[row, :3][valid[row, :3]].sum(0) / max(1, valid[row, :3].sum())
                narrow = mean @ predictor["narrow"]["kernel"] + predictor["narrow"]["bias"]
                activity = np.asarray(jax.nn.gelu(narrow)) @ predictor["wide"]["kernel"]
                activity = activity + predictor["wide"]["bias"]
            used = np.argsort(-activity, kind="stable")[:4]
            hidden[:3, np.setdiff1d(np.arange(10), used)] = 0
            np.testing.assert_allclose(found[row], apply("down", hidden), rtol=2e-5, atol=2e-5)


def test_with_all_neurons_it_is_the_dense_model(few):
    _, params, batch = few
    paths = {path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    own = {path for path in paths if "/feed_forward/mlp/of_image/" in path}
    assert own and all("/of_" not in path for path in paths - own)
    found, gradient = losses(task(1.0), params, batch)
    wanted, of_dense = losses(task(**DENSE), without_predictors(params), batch)
    for name, value in wanted.items():
        if name != "loss":
            np.testing.assert_allclose(value, found[name], rtol=1e-6, err_msg=name)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        without_predictors(gradient),
        of_dense,
    )


def test_the_predictor_learns_alone(few):
    """Its loss moves nothing else, and a few steps on it name more of the neurons."""
    built, params, batch = few

    def loss(params):
        found = built.metrics(params, batch, jax.random.key(0), deterministic=True)
        return found["neurons/loss"][0] / found["neurons/loss"][1], found["neurons/found"]

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (first, (hits, count)), gradient = step(params)
    assert count == 2 * 3  # layers and pictures
    assert 0 <= hits <= count
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert bool(np.any(leaf)) == ("/of_image/" in path_of(path)), path_of(path)
    for _ in range(60):
        _, gradient = step(params)
        params = jax.tree.map(lambda p, g: p - 2 * g, params, gradient)
    (last, (more, _)), _ = step(params)
    assert last < 0.7 * first
    assert more > max(hits, 0.8 * count)


def test_a_picture_depends_on_no_other_and_on_none_that_is_missing(few):
    built, params, batch = few
    built = built.__class__(**{**built.__dict__, "model": built.model.for_inference()})
    found = outputs(built, params, batch)
    other = jax.tree.map(lambda x: x, batch)
    other["image"]["pixels"] = batch["image"]["pixels"].at[1].mul(0.3)
    for x, y in zip(found, outputs(built, params, other), strict=True):
        np.testing.assert_array_equal(np.delete(x, 1, 0), np.delete(y, 1, 0))
        assert not np.array_equal(x[1], y[1])
    absent = jax.tree.map(lambda x: x, batch)
    absent["image"]["present"] = batch["image"]["present"].at[1].set(False)
    noise = jax.tree.map(lambda x: x, absent)
    noise["image"]["pixels"] = batch["image"]["pixels"].at[1].set(jnp.nan)
    np.testing.assert_array_equal(
        outputs(built, params, absent)[0], outputs(built, params, noise)[0]
    )


def test_int8_weights_are_gathered_by_what_they_stand_for(few):
    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 127, (6, 10)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (1, 10)).astype("f")
    o = TransformerOptions(6, 1, 1, 10, activation="relu", feed_forward_bias=False, gathered=True)
    down = jnp.asarray(rng.normal(size=(10, 6)), jnp.float32)
    predictor = {
        "narrow": {"kernel": jnp.ones((6, 32)), "bias": jnp.zeros(32)},
        "wide": {"kernel": jnp.ones((32, 10)), "bias": jnp.arange(10.0)},
    }
    x = jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32)
    found = []
    for up in (Quantized(jnp.asarray(kernel), jnp.asarray(scale)), jnp.asarray(kernel * scale)):
        maps = {"up": {"kernel": up}, "down": {"kernel": down}}
        params = {"mlp": {"shared": maps, "of_image": predictor}}
        found.append(alone(o, params, x, jnp.ones((1, 5), bool)))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_the_first_of_equals_is_chosen():
    scores = jnp.array([[1.0, 3, 3, 0, 3], [0, 0, 0, 0, 0]])
    assert highest(scores, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize(
    "changes", [{"model__window": 8}, {"model__sparse": {"image": {"grid": 1}}}]
)
def test_windows_and_grids_put_no_patch_before_another(changes):
    task(**changes).abstract_params()


def test_a_tower_that_does_not_run_has_nothing_to_learn():
    towers = {"model__fusion": "late", "objectives__captioning__weight": 0.0}
    built = task(**towers, objectives__matching__weight=0.0)
    params, batch = tiny.params(built), tiny.batch(built, 2)
    looked = {"looked": jnp.ones((2, 4, 16)), "looked_valid": jnp.ones((2, 4), bool)}
    batch["image"] = {"present": batch["image"]["present"], **looked}
    found, _ = losses(built, params, batch)
    assert found["neurons/loss"] == (0, 0)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"model__feed_forward_options": {"of": ("text",)}}, "leave 'text' out"),
        ({"model__feed_forward_options": {"of": ("sound",)}}, "no modality 'sound', only image"),
        ({"model__feed_forward_options": {"share": 0.0}}, "feed_forward_options.share=0.0"),
        (DENSE | {"objectives__neurons__weight": 1.0}, "objectives.neurons: no layer uses few"),
        ({"objectives__neurons__weight": 0.0}, "no objective trains what names the neurons"),
    ],
)
def test_what_cannot_be_is_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        built = task(**changes)
        params = tiny.params(built)
        batch = tiny.batch(built, 2)
        jax.eval_shape(
            lambda p: built.metrics(p, batch, jax.random.key(0), deterministic=True), params
        )
