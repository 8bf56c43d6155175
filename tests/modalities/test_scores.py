"""The vocabulary's products, which have a gradient of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.costs.flops import equations
from unified_mm.modalities.text import scores


def both(function, *args):
    found, pull = jax.vjp(function, *args)
    return found, *pull(jnp.sin(found))


@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients_are_those_of_the_product(dtype, close):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8)).astype(dtype)
    table = jax.random.normal(jax.random.key(1), (5, 8)).astype(dtype)
    wide = [np.asarray(each, np.float32) for each in (x, table)]
    expected = both(lambda x, table: jnp.einsum("BTD,VD->BTV", x, table), *wide)
    for one, other in zip(both(scores, x, table), expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=close, atol=close)


def test_every_product_takes_the_type_of_the_computation():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 3, 8), (5, 8))]
    found = equations(jax.make_jaxpr(lambda *args: both(scores, *args))(*shapes).jaxpr)
    products = [each for each in found if each.primitive.name == "dot_general"]
    assert len(products) >= 3
    assert {operand.aval.dtype for each in products for operand in each.invars} == {
        jnp.dtype(jnp.bfloat16)
    }
