"""Learned positions: no text is read with the last one again and again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.modalities.text import TextEmbedder, TextEmbedding

POSITIONS = 5
EMBEDDER = TextEmbedder("text", TextEmbedding(used=10, max_positions=POSITIONS), 8)


def batch(length, **more):
    ids = jnp.arange(2 * length, dtype=jnp.int32).reshape(2, length) % 10
    ones = jnp.ones((2, length), bool)
    return {"ids": ids, "valid": ones, "present": jnp.ones(2, bool), **more}


@pytest.fixture(scope="module")
def params():
    names = {"tokens": (64, 8), "positions": (POSITIONS, 8), "modality": (8,)}
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in names.items()}


def embed(params, batch):
    return EMBEDDER.apply({"params": params}, batch).embeddings


def test_more_tokens_than_positions_are_refused_as_it_is_traced(params):
    message = r"texts of 6 tokens \(model.modalities.text.length\), but the model learns 5 pos"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(embed, params, batch(POSITIONS + 1))


def test_a_model_whose_texts_are_longer_than_its_positions_is_not_built():
    task = tiny.task(model__modalities__text__max_positions=11)
    with pytest.raises(ValueError, match="texts of 12 tokens .*the model learns 11 positions"):
        task.abstract_params()
    tiny.task(
        model__modalities__text__max_positions=11,
        model__modalities__text__learned_positions=False,
        model__rotary_base=100.0,
    ).abstract_params()


def test_places_beyond_the_last_position_become_nan_and_others_are_as_before(params):
    places = jnp.array([[0, 4, 2], [3, 5, 1]], jnp.int32)
    found = np.asarray(embed(params, batch(3, text_position=places)))
    assert np.isnan(found[1, 1]).all() and np.isfinite(found).sum() == 5 * 8
    within = jnp.array([[0, 4, 2], [3, 4, 1]], jnp.int32)

    def total(params, look_up):
        rows = batch(3, text_position=within)
        if look_up is None:
            return jnp.square(embed(params, rows)).sum()
        x = params["tokens"][rows["ids"]] * 8**0.5 + params["positions"][within]
        return jnp.square(x + params["modality"]).sum()

    one, other = (
        jax.jit(jax.value_and_grad(total), static_argnums=1)(params, how) for how in (None, "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
