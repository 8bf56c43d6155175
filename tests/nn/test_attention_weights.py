"""The weights that attention hands out, against softmax written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn import sow as attention_weights
from unified_mm.nn import transformer
from unified_mm.nn.attention.masks import reference_mask
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.tokens import concatenate, spans

STREAM = View("captioning", "prefix", autoregressive=True)
BLOCK = "transformer/layers/block_0/attention"
GATED = {
    "model__fusion": "gated_cross_attention",
    "model__resampler__latents": 3,
    "model__resampler__layers": 2,
    "model__resampler__heads": 2,
    "model__resampler__head_width": 4,
    "objectives__matching__weight": 0.0,
}


@pytest.fixture(scope="module")
def gated():
    task = tiny.task(**GATED)
    return task, tiny.params(task)


def weights_of(task, params, batch, view=STREAM):
    """By path, the weights that a task hands out."""

    @jax.jit
    def read(params, batch):
        _, left = task.model.apply(
            {"params": params}, batch, (view,), method="encode", mutable=["attention"]
        )
        return attention_weights.by_path(left["attention"])

    return jax.device_get(read(params, batch))


def batch_without_an_image(task):
    batch = tiny.batch(task, 3)
    batch["image"]["present"] = jnp.array([True, False, True])
    return batch


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(x, p, axes=1):
    return np.tensordot(x, p["kernel"], axes) + p["bias"]


def stack_in_numpy(params, x, mask, heads):
    """Each layer's weights [B, H, Q, K] in float64; fewer heads of keys are repeated."""
    found = []
    for layer in range(2):
        p = jax.tree.map(lambda leaf, layer=layer: np.float64(leaf[layer]), params["layers"])
        p = p["block_0"]
        query, key, value = (
            dense(layer_norm(x, p["attention_norm"]), p["attention"][name]["shared"])
            for name in ("query", "key", "value")
        )
        key, value = (np.repeat(each, heads // each.shape[2], 2) for each in (key, value))
        scores = np.einsum("bqha,bkha->bhqk", query, key) / np.sqrt(query.shape[-1])
        power = np.where(mask[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
        found.append(power / np.maximum(power.sum(-1, keepdims=True), 1e-300))
        seen = np.einsum("bhqk,bkha->bqha", found[-1], value)
        x = x + dense(seen, p["attention"]["output"]["shared"], 2)
        mlp = p["feed_forward"]["mlp"]["shared"]
        x = x + dense(gelu(dense(layer_norm(x, p["feed_forward_norm"]), mlp["up"])), mlp["down"])
    return np.stack(found)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [("prefix", {}), ("causal", {"model__key_value_heads": 1})],
)
def test_weights_are_the_softmax_written_out(rule, changes):
    task = tiny.task(**changes)
    params, batch = tiny.params(task), batch_without_an_image(task)
    view = View("captioning", rule)

    def embedded(model):
        context = model.embed_context(batch)
        text = model.embed_text(batch["text"], view.name, context[0].embeddings.shape[1])
        return concatenate([*context, text])

    tokens = jax.jit(lambda p: task.model.apply({"params": p}, method=embedded))(params)
    table = MaskTable((view,))
    mask = np.asarray(reference_mask(table, tokens.metadata, tokens.metadata))
    expected = stack_in_numpy(params["transformer"], np.float64(tokens.embeddings), mask, 2)
    found = weights_of(task, params, batch, view)[BLOCK]
    assert found.values.shape == expected.shape and found.values.dtype == np.float32
    assert found.queries == found.keys == tokens.metadata.groups
    np.testing.assert_allclose(found.values, expected, atol=2e-5)
    assert not found.values[np.broadcast_to(~mask[:, None], found.values.shape)].any()
    sees = mask.any(-1)[:, None]
    np.testing.assert_allclose(
        found.values.sum(-1), np.broadcast_to(sees, (2, 3, 2, 16)), atol=1e-5
    )


def test_every_attention_of_a_gated_model_is_there(gated):
    task, params = gated
    batch = batch_without_an_image(task)
    found = weights_of(task, params, batch)
    cross = found["transformer/layers/cross/attention"]
    assert set(found) == {
        "towers_image/layers/block_0/attention",
        "resamplers_image/attention_0",
        "resamplers_image/attention_1",
        "transformer/layers/cross/attention",
        BLOCK,
    }
    assert cross.values.shape == (2, 3, 2, 12, 3)
    assert spans(cross.queries) == {"captioning": slice(0, 12)}
    assert spans(cross.keys) == {"image": slice(0, 3)}
    # Of the second example there is no image: nothing is seen, and nothing taken.
    expected = np.broadcast_to(np.array([1, 0, 1])[:, None, None], (2, 3, 2, 12))
    np.testing.assert_allclose(cross.values.sum(-1), expected, atol=1e-5)
    for number in range(2):
        latents = found[f"resamplers_image/attention_{number}"]
        assert latents.values.shape == (1, 3, 2, 3, 4 + 3)
        assert spans(latents.keys) == {"features": slice(0, 4), "latents": slice(4, 7)}
        np.testing.assert_allclose(latents.values.sum(-1), 1, atol=1e-5)
        assert not latents.values[:, 1, :, :, :4].any()
    chunked = weights_of(tiny.replace_model(task, attention="chunked"), params, batch)
    assert chunked.keys() == found.keys()
    for path, weights in found.items():
        np.testing.assert_allclose(chunked[path].values, weights.values, atol=1e-5)


def test_nothing_is_computed_where_nobody_asks(gated, monkeypatch):
    task, params = gated
    batch = tiny.batch(task)

    def program(*mutable):
        def encode(params, batch):
            found = task.model.apply(
                {"params": params}, batch, (STREAM,), method="encode", mutable=list(mutable)
            )
            return found[0][STREAM.name].text, found[1]

        return jax.jit(encode).lower(params, batch).as_text()

    def init():
        return task.model.init(jax.random.key(0), batch, (STREAM,), method="encode")

    assert set(jax.eval_shape(init)) == {"params"}
    usual = program()
    assert program("intermediates") == usual != program("attention")
    for module in (attention_weights, transformer):
        monkeypatch.setattr(module, "ATTENTION", "nobody's")
    assert program() == usual
