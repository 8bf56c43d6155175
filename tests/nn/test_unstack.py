"""Layers with parameters of their own against the scanned stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.generate import TextWriter
from unified_mm.inference.sampling import make_sampling, sampling_arrays
from unified_mm.nn.attention.rules import View
from unified_mm.nn.unstack import stack_layers, unstack_layers

STREAM = View("captioning", "prefix", autoregressive=True)
GATED = {
    "model__fusion": "gated_cross_attention",
    "model__layers": 4,
    "model__cross__every": 2,
    "model__cross__start": 0.5,
    "model__resampler__latents": 3,
    "model__resampler__layers": 1,
    "model__resampler__heads": 2,
    "model__resampler__head_width": 4,
    "objectives__matching__weight": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "cache"),
    [pytest.param({}, "same", marks=pytest.mark.slow), (GATED, "int8")],
    ids=["early", "gated, int8"],
)
def test_the_same_text_and_embeddings(changes, cache):
    task = tiny.replace_model(tiny.task(**changes), cache=cache)
    other = tiny.replace_model(task, unstacked=True)
    params, batch = tiny.params(task), tiny.batch(task, 3)

    asked = {
        "max_tokens": jnp.full(3, 6, jnp.int32),
        "stop": jnp.full((3, 1), -1, jnp.int32),
        "sampling": make_sampling(**jax.tree.map(jnp.asarray, sampling_arrays(GREEDY, 3, 0))),
    }

    def ask(task):
        @jax.jit
        def run(params, batch):
            encoded = task.model.apply({"params": params}, batch, (STREAM,), method="encode")
            writer = TextWriter(task.model, STREAM, padding=0, cache_room=6)
            state = writer.generate(params, writer.start(params, batch, **asked))
            return encoded[STREAM.name].text, state.written, state.likelihood

        return run

    stacked, apart = ask(task)(params, batch), ask(other)(unstack_layers(params), batch)
    np.testing.assert_allclose(apart[0], stacked[0], atol=1e-5)
    np.testing.assert_array_equal(apart[1], stacked[1])
    np.testing.assert_allclose(apart[2], stacked[2], atol=1e-3)


@pytest.mark.parametrize("layers", [1, 12])
def test_there_and_back(layers):
    rng = np.random.default_rng(0)
    stack, alone = (rng.normal(size=shape).astype(np.float32) for shape in ((layers, 3), (4, 2)))
    params = {
        "transformer": {"layers": {"block_0": {"kernel": stack}}, "norm": {"scale": alone}},
        "resamplers_image": {"attention_0": {"kernel": alone}},
    }
    apart = unstack_layers(params)
    assert set(apart["transformer"]) == {"norm", *(f"layers_{n}" for n in range(layers))}
    # As transformations of trees give it back, by the alphabet.
    again = stack_layers(jax.tree.map(lambda x: x, apart))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, params, again)
