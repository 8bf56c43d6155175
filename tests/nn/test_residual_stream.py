"""The residual stream that stacks hand out, against models that end after fewer layers."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from unified_mm.nn import sow as residual_stream
from unified_mm.nn import transformer
from unified_mm.nn.attention.rules import View
from unified_mm.nn.sow import layer_names, streams_by_layer
from unified_mm.nn.unstack import unstack_layers

STREAM = View("captioning", "prefix", autoregressive=True)
NO_MATCHING = {"objectives__matching__weight": 0.0}
MODELS = {
    "early": NO_MATCHING,
    "gated": NO_MATCHING
    | {
        "model__fusion": "gated_cross_attention",
        "model__cross__start": 0.5,
        "model__resampler__latents": 3,
        "model__resampler__layers": 1,
        "model__resampler__heads": 2,
        "model__resampler__head_width": 4,
    },
}
ONE_LAYER = {"model__layers": 1, "model__tower__layers": 2}


def layer_norm(x, p):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def encode(task, params, batch, mutable):
    @jax.jit
    def read(params, batch):
        return task.model.apply(
            {"params": params}, batch, (STREAM,), method="encode", mutable=mutable
        )

    encoded, left = read(params, batch)
    return np.asarray(encoded[STREAM.name].text), left


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_hands_out_what_a_model_that_ends_there_gives(name):
    task = tiny.task(**MODELS[name])
    params, batch = tiny.params(task), tiny.batch(task, 3)
    text, left = encode(task, params, batch, ["residual"])
    options = task.model.options
    streams = streams_by_layer(left["residual"], "transformer", options)
    cross = [f"cross_{period}" for period in range(2)]
    gated = name == "gated"
    assert list(streams) == layer_names(options)
    assert list(streams) == (
        ["embedded", cross[0], "layer_0", cross[1], "layer_1"]
        if gated
        else ["embedded", "layer_0", "layer_1"]
    )
    norm = params["transformer"]["norm"]
    tokens = slice(-text.shape[1], None)
    np.testing.assert_allclose(layer_norm(streams["layer_1"], norm)[:, tokens], text, atol=2e-5)
    # The tower of a gated model, which the text looks at in every layer, keeps both of its layers.
    main = params["transformer"]
    first = jax.tree.map(lambda x: x[:1], main["layers"])
    shorter = {**params, "transformer": {**main, "layers": first}}
    ended, _ = encode(tiny.task(**MODELS[name], **ONE_LAYER), shorter, batch, [])
    np.testing.assert_allclose(layer_norm(streams["layer_0"], norm)[:, tokens], ended, atol=2e-5)
    in_order = list(streams.values())
    moved = [np.abs(a - b).max() for a, b in zip(in_order, in_order[1:])]
    assert min(moved) > 1e-3


def test_layers_apart_hand_out_the_same():
    task = tiny.task(**NO_MATCHING)
    params, batch = tiny.params(task), tiny.batch(task, 3)
    _, left = encode(task, params, batch, ["residual"])
    stacked = streams_by_layer(left["residual"], "transformer", task.model.options)
    apart = tiny.replace_model(task, unstacked=True)
    _, left = encode(apart, unstack_layers(params), batch, ["residual"])
    found = streams_by_layer(left["residual"], "transformer", apart.model.options)
    assert found.keys() == stacked.keys()
    for name, x in stacked.items():
        np.testing.assert_allclose(found[name], x, atol=1e-5)


def test_nothing_is_left_where_nobody_asks(monkeypatch):
    task = tiny.task(**MODELS["gated"])
    params, batch = tiny.params(task), tiny.batch(task)

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
    assert program("intermediates") == usual != program("residual")
    for module in (residual_stream, transformer):
        monkeypatch.setattr(module, "RESIDUAL", "nobody's")
    monkeypatch.setattr(nn.Module, "sow", lambda *args: False)
    assert program() == usual
