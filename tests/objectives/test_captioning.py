"""Next-token cross-entropy against NumPy written out, and what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.objectives.captioning import score_text


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), chunk=st.integers(0, 5))
def test_likelihood_accuracy_and_what_is_scored_written_out(seed, chunk):
    rng = np.random.default_rng(seed)
    rows, length, vocabulary = 3, 5, 4
    logits = rng.normal(size=(rows, length, vocabulary), scale=2).astype(np.float32)
    ids = rng.integers(0, vocabulary, (rows, length))
    valid = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
    flags = rng.random((rows, length)) < 0.7
    present = rng.random(rows) < 0.7
    text = {"ids": ids.astype(np.int32), "valid": valid, "scored": flags, "present": present}
    text = jax.tree.map(jnp.asarray, text)
    found = score_text(lambda x: x, jnp.asarray(logits), text, chunk)  # logits for embeddings
    likelihood, right, scored = map(np.asarray, found)
    for b in range(rows):
        for place in range(1, length):
            row = logits[b, place - 1].astype(np.float64)
            probability = np.exp(row) / np.exp(row).sum()
            true = ids[b, place]
            np.testing.assert_allclose(
                likelihood[b, place - 1], np.log(probability[true]), atol=1e-5
            )
            assert right[b, place - 1] == (row.argmax() == true)
            counted = valid[b, place] and flags[b, place] and present[b]
            assert scored[b, place - 1] == counted


def test_a_prompt_is_read_and_not_scored():
    """The prompt's own tokens have no part in the loss but through what they say to the answer."""
    task = tiny.task()
    text = task.modalities["text"]
    arrays = text.encode("a red square", "of size")
    alone = text.encode("", "of size")
    assert arrays["prompted"] and not alone["prompted"]
    assert arrays["scored"].sum() == alone["scored"].sum() >= 2  # the answer and the end
    scored = {k: jnp.asarray(v)[None] for k, v in arrays.items()}
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, text.length, text.vocabulary)), jnp.float32)

    def loss(logits):
        likelihood, _, counted = score_text(lambda x: x, logits, scored)
        return -jnp.where(counted, likelihood, 0.0).sum()

    gradient = np.abs(np.asarray(jax.grad(loss)(logits))[0]).sum(-1)
    np.testing.assert_array_equal(gradient[:-1] > 0, arrays["scored"][1:])
    assert gradient[-1] == 0


def test_logits_of_all_tokens_are_never_there_at_once():
    """The same loss and gradient in chunks, and a compiled program without [B, T, V]."""
    rng = np.random.default_rng(0)
    rows, length, width, vocabulary = 2, 33, 8, 640
    x = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, vocabulary, (rows, length)), jnp.int32)
    there = jnp.ones((rows, length), bool)
    text = {"ids": ids, "valid": there, "scored": there, "present": there[:, 0]}

    def compiled(chunk):
        def loss(x, table):
            found = score_text(lambda x: jnp.einsum("BTD,VD->BTV", x, table), x, text, chunk)
            return -found[0].mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, table).compile()

    whole, parts = compiled(0), compiled(5)
    for one, other in zip(jax.tree.leaves(whole(x, table)), jax.tree.leaves(parts(x, table))):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    assert f"f32[{rows},{length - 1},{vocabulary}]" in whole.as_text()
    assert f"f32[{rows},{length - 1},{vocabulary}]" not in parts.as_text()
    memory = [each.memory_analysis().temp_size_in_bytes for each in (whole, parts)]
    assert memory[1] < memory[0] / 2
