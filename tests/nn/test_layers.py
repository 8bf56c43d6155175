"""The product of a dense map, and its own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.nn.layers import product

SHAPES = {
    "widens": ((2, 3, 4), (4, 6), 1),
    "narrows": ((2, 3, 6), (6, 4), 1),
    "into heads": ((2, 3, 4), (4, 2, 3), 1),
    "out of heads": ((2, 3, 2, 3), (2, 3, 4), 2),
    "one vector": ((4,), (4, 3), 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_what_jax_derives(shape):
    first, second, contracted = shape
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (first, second))

    def gradients(function):
        def total(x, kernel):
            return jnp.sin(function(x, kernel)).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1)))(x, kernel)

    expected = gradients(lambda x, kernel: jnp.tensordot(x, kernel, axes=contracted))
    found = gradients(lambda x, kernel: product(x, kernel, contracted))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [4, 64])
def test_the_narrower_side_is_the_first_of_the_kernels_gradient(width):
    """The first side of this product is what a CPU transposes in memory."""
    x, kernel = jnp.ones((2, 3, 16)), jnp.ones((16, width))
    program = jax.make_jaxpr(jax.grad(lambda kernel: product(x, kernel, 1).sum()))(kernel)
    (line,) = [
        each
        for each in program.eqns
        if each.primitive.name == "dot_general" and each.outvars[0].aval.size == kernel.size
    ]
    assert line.invars[0].aval.shape[-1] == min(16, width)
