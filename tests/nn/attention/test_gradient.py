"""Plain attention's own gradient against that which jax derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.nn.attention.masks import masked_attention

WIDTH = 4


def derived(query, key, value, mask, bias):
    """The same by jax's own function, whose gradient jax derives; no key seen gives zero."""
    added = None if bias is None else bias[:, None]
    seen = jax.nn.dot_product_attention(query, key, value, added, mask[:, None])
    return jnp.where(mask.any(-1)[:, :, None, None], seen, 0)


def values_and_gradients(function, arrays, mask, bias, cotangent):
    def run(arrays, bias, cotangent):
        output, back = jax.vjp(lambda arrays, bias: function(*arrays, mask, bias), arrays, bias)
        return output, back(cotangent)

    return jax.jit(run)(arrays, bias, cotangent)


def drawn(seed, rows, columns, heads, groups, biased, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [(rows, heads), (columns, groups), (columns, groups), (rows, heads)]
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=(2, length, count, WIDTH)), dtype) for length, count in shapes
    )
    mask = rng.random((2, rows, columns)) < 0.6
    mask[0, 0] = False
    bias = jnp.asarray(rng.normal(size=mask.shape), jnp.float32) if biased else None
    return (query, key, value), jnp.asarray(mask), bias, cotangent


def close(found, expected, within):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=within, atol=within)


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([(1, 1), (5, 7)]),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_is_what_jax_derives(lengths, heads, biased, seed):
    arrays, mask, bias, cotangent = drawn(seed, *lengths, *heads, biased)
    expected = values_and_gradients(derived, arrays, mask, bias, cotangent)
    found = values_and_gradients(masked_attention, arrays, mask, bias, cotangent)
    close(found, expected, 2e-6)
    output, ((query, *_), *_) = found
    assert not output[0, 0].any() and not query[0, 0].any()  # nothing seen: zero, and not NaN


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_softmax_of_16_bits_is_in_float32(dtype):
    arrays, mask, bias, cotangent = drawn(0, 5, 7, 4, 2, True, dtype)
    found = values_and_gradients(masked_attention, arrays, mask, bias, cotangent)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangent))
    expected = values_and_gradients(derived, wide[0], mask, bias, wide[1])
    assert found[0].dtype == found[1][0][0].dtype == dtype
    expected = jax.tree.map(lambda x, like: x.astype(like.dtype), expected, found)
    close(found, expected, 0.05)


def test_under_a_scan_recomputation_and_vmap():
    arrays, mask, bias, cotangent = drawn(1, 5, 5, 2, 2, True)

    def twice(function):
        def layer(x, _):
            return jax.checkpoint(lambda x: x + function(x, *arrays[1:], mask, bias))(x), None

        def total(queries):
            return jax.vmap(lambda x: jax.lax.scan(layer, x, None, length=2)[0])(queries).sum()

        return jax.jit(jax.grad(total))(jnp.stack([arrays[0], cotangent]))

    close(twice(masked_attention), twice(derived), 1e-5)
