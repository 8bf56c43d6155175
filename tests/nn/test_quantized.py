"""int8 weights and products with them against sums written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.nn.layers import Dense
from unified_mm.nn.quantized import Quantized

# The shape of x and of the array, the array's contracted axes, and the sum written out.
PRODUCTS = {
    "dense": ((2, 3, 8), (8, 5), (0,), "abi,io->abo"),
    "into heads": ((2, 8), (8, 2, 3), (0,), "ai,iho->aho"),
    "out of heads": ((2, 3, 2, 4), (2, 4, 5), (0, 1), "abhi,hio->abo"),
    "scores of tokens": ((2, 3, 8), (7, 8), (1,), "abd,vd->abv"),
}


def rounded(array, axes):
    """int8 and scales, one for each place along the other axes; |values| of 127.5 are clipped."""
    scale = np.abs(array).max(axes, keepdims=True) / 127.5
    return np.clip(np.rint(array / scale), -128, 127), scale


def numbers(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(array, axes, activations=""):
    values, scale = rounded(array, axes)
    return Quantized(jnp.asarray(values, jnp.int8), jnp.asarray(scale), activations)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_with_what_the_weights_stand_for(name):
    of_x, of_array, axes, letters = PRODUCTS[name]
    x, array = numbers(of_x, 0), numbers(of_array, 1)
    kept = quantized(array, axes)
    values, scale = rounded(array, axes)
    np.testing.assert_allclose(kept.floats(), values * scale, rtol=1e-6)
    assert kept.shape == of_array and np.abs(values * scale - array).max() <= scale.max()
    want = np.einsum(letters, x, values * scale)
    got = jax.jit(lambda x, kept: kept.product(x, axes))(x, kept)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_int8_activations_are_rounded_by_vector_and_multiplied_as_int8(name):
    of_x, of_array, axes, letters = PRODUCTS[name]
    x, array = numbers(of_x, 0), numbers(of_array, 1)
    x[(..., *(0,) * len(axes))] = 4  # -127.5 would lie between two numbers, 127.5 is clipped
    x[0] = 0  # a vector of zeros has no largest number to go by
    kept = quantized(array, axes, "int8")
    last = tuple(range(x.ndim - len(axes), x.ndim))
    with np.errstate(invalid="ignore"):
        values, scale = (np.nan_to_num(each) for each in rounded(x, last))
    weights, by_channel = rounded(array, axes)
    want = np.einsum(letters, values * scale, weights * by_channel)
    product = jax.jit(lambda x, kept: kept.product(x, axes))
    np.testing.assert_allclose(product(x, kept), want, rtol=1e-5, atol=1e-5)
    program = product.lower(x, kept).as_text()
    (multiplied,) = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert multiplied.count("xi8>") == 2 and "xi32>" in multiplied.split("->")[1]


def test_nothing_times_weights_is_nothing():
    kept = quantized(numbers((8, 5), 0), (0,), "int8")
    assert kept.product(jnp.zeros((2, 0, 8)), (0,)).shape == (2, 0, 5)


def test_rows_of_a_table_are_looked_up():
    table = numbers((7, 4), 0)
    values, scale = rounded(table, (1,))
    ids = np.array([[6, 0], [3, 3]])
    rows = quantized(table, (1,))[jnp.asarray(ids)]
    np.testing.assert_allclose(rows, (values * scale)[ids], rtol=1e-6)


def test_a_dense_map_keeps_its_type_and_its_bias():
    dense = Dense((5,), (None,), (None,), dtype=jnp.bfloat16)
    kernel, bias, x = numbers((8, 5), 0), numbers((5,), 1), numbers((3, 8), 2)
    params = {"kernel": quantized(kernel, (0,)), "bias": jnp.asarray(bias)}
    got = dense.apply({"params": params}, jnp.asarray(x))
    assert got.dtype == jnp.bfloat16
    values, scale = rounded(kernel, (0,))
    np.testing.assert_allclose(
        np.asarray(got, np.float32), x @ (values * scale) + bias, rtol=2e-2, atol=2e-2
    )
