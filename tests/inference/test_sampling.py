"""Drawing tokens: what may be drawn against its definition, what is drawn against its share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.inference.decoding import Decoding
from unified_mm.inference.sampling import allowed, draw, make_sampling, sampling_arrays

VOCABULARY = 12
draw_once = jax.jit(draw)
allowed_once = jax.jit(allowed)
sampling_once = jax.jit(make_sampling)


def sampling(decoding, rows, first=0):
    arrays = sampling_arrays(decoding, rows // decoding.samples, first)
    return sampling_once(**arrays)


def drawn(logits, decoding, number=0, first=0):
    rows = len(logits)
    numbers = jnp.full(rows, number, jnp.int32)
    return np.asarray(draw_once(logits, sampling(decoding, rows, first), numbers))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, VOCABULARY + 2),
    top_p=st.floats(0.01, 1.0),
)
def test_what_may_be_drawn_is_the_definition(seed, top_k, top_p):
    """The k likeliest; of these the fewest, likeliest first, whose share reaches p."""
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.normal(size=VOCABULARY).astype(np.float32))[::-1].copy()
    k = min(top_k or VOCABULARY, VOCABULARY)
    share = np.exp(scores[:k].astype(np.float64))
    share /= share.sum()
    expected = []
    for token in range(k):
        expected.append(token)
        if sum(share[: token + 1]) >= top_p:
            break
    found = allowed_once(scores[None], np.array([top_k]), np.array([top_p], np.float32))
    found = np.flatnonzero(np.asarray(found)[0])
    # At the very edge rounding decides.
    if abs(sum(share[: len(expected)]) - top_p) > 1e-5:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(temperature=0.7),
        Decoding(temperature=1.5, top_k=4),
        Decoding(temperature=1.0, top_p=0.6),
        Decoding(temperature=2.0, top_k=5, top_p=0.7),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(decoding):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=VOCABULARY).astype(np.float32) * 1.5
    share = np.exp(scores / decoding.temperature)
    share /= share.sum()
    order = np.argsort(-share)
    kept = order[: decoding.top_k or VOCABULARY]
    within = share[kept] / share[kept].sum()
    kept = kept[np.cumsum(within) - within < decoding.top_p]
    expected = np.zeros(VOCABULARY)
    expected[kept] = share[kept] / share[kept].sum()
    rows = 20_000
    tokens = drawn(np.tile(scores, (rows, 1)), decoding)
    found = np.bincount(tokens, minlength=VOCABULARY) / rows
    assert (found[expected == 0] == 0).all()
    # Five standard errors of a share.
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / rows**0.5)


def test_without_a_temperature_and_among_one_the_likeliest_is_taken():
    scores = np.random.default_rng(1).normal(size=(64, VOCABULARY)).astype(np.float32)
    best = scores.argmax(1)
    np.testing.assert_array_equal(drawn(scores, Decoding()), best)
    np.testing.assert_array_equal(drawn(scores, Decoding(temperature=3.0, top_k=1)), best)
    np.testing.assert_array_equal(drawn(scores, Decoding(temperature=3.0, top_p=1e-6)), best)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    scores = np.random.default_rng(2).normal(size=(6, VOCABULARY)).astype(np.float32)
    warm = Decoding(temperature=1.0, seed=5)
    together = drawn(scores, warm)
    alone = [int(drawn(scores[row : row + 1], warm, first=row)[0]) for row in range(6)]
    np.testing.assert_array_equal(together, alone)
    again = [drawn(scores, warm, number=step) for step in range(8)]
    assert len({tuple(row) for row in again}) > 4  # each token has a key of its own
    other = drawn(scores, Decoding(temperature=1.0, seed=6))
    assert (other != together).any()


def test_greedy_rows_stay_greedy_beside_rows_that_draw():
    scores = np.random.default_rng(3).normal(size=(2, VOCABULARY)).astype(np.float32)
    mixed = sampling(Decoding(temperature=5.0), 2)
    mixed = mixed.replace(temperature=jnp.array([0.0, 5.0]))
    for number in range(10):
        found = draw_once(scores, mixed, jnp.full(2, number, jnp.int32))
        assert int(found[0]) == scores[0].argmax()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "give a temperature above 0"),
        ({"tokens": 0}, "tokens=0: must be at least 1"),
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "temperature": 1.0}, "beam search draws nothing"),
        ({"beams": 2, "samples": 3}, "no more texts than beams"),
        ({"samples": 2}, "would all be the same"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": float("inf")}, "temperature=inf: must be at least 0 and at most"),
        ({"temperature": 1.0, "top_k": 2**40}, "top_k=1099511627776: must be at least 0 and at"),
        ({"temperature": 1.0, "samples": 100_000}, "samples=100000: must be at least 1 and at"),
        ({"length_penalty": 5.0}, "length_penalty compares beams"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Decoding(**wrong)
