"""Next-token cross-entropy against NumPy written out, and what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.objectives.captioning import next_token_scores


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_likelihood_accuracy_and_what_is_scored_written_out(seed):
    rng = np.random.default_rng(seed)
    rows, length, vocabulary = 3, 5, 4
    logits = rng.normal(size=(rows, length - 1, vocabulary), scale=2).astype(np.float32)
    ids = rng.integers(0, vocabulary, (rows, length))
    valid = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
    flags = rng.random((rows, length)) < 0.7
    present = rng.random(rows) < 0.7
    text = {"ids": ids.astype(np.int32), "valid": valid, "scored": flags, "present": present}
    found = next_token_scores(jnp.asarray(logits), jax.tree.map(jnp.asarray, text))
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
    logits = jnp.asarray(rng.normal(size=(1, text.length - 1, text.vocabulary)), jnp.float32)

    def loss(logits):
        likelihood, _, counted = next_token_scores(logits, scored)
        return -jnp.where(counted, likelihood, 0.0).sum()

    gradient = np.abs(np.asarray(jax.grad(loss)(logits))[0]).sum(-1)
    np.testing.assert_array_equal(gradient > 0, arrays["scored"][1:])
