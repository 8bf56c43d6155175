"""What a stack keeps for its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import REMAT, TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.nn.transformer import Transformer
from unified_mm.parallel.sharding import without_names

ROWS, TOKENS, WIDTH = 2, 64, 32
UNROLLED = "full, in one step of the scan"


@pytest.fixture(scope="module")
def gradients():
    """By policy: gradients of a stack's outputs, and the bytes that the program holds meanwhile."""
    x = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))
    metadata = single_document(jnp.ones((ROWS, TOKENS), bool), Group("t", "text", TOKENS))
    params = None
    found = {}
    for name, remat, unroll in [*((each, each, 1) for each in REMAT), (UNROLLED, "full", 6)]:
        options = TransformerOptions(WIDTH, 6, 4, 4 * WIDTH, remat=remat, unroll=unroll)
        plan = plan_attention(options, MaskTable((View("t", "joint"),)), metadata, metadata)
        stack = Transformer(options)
        params = params or without_names(stack.init(jax.random.key(0), x, plan))

        def total(params, x, stack=stack, plan=plan):
            return jnp.square(stack.apply(params, x, plan)[0]).sum()

        program = jax.jit(jax.grad(total, (0, 1))).lower(params, x).compile()
        memory = program.memory_analysis().temp_size_in_bytes
        found[name] = program(params, x), memory
    return found


@pytest.mark.parametrize("remat", [*REMAT[1:], UNROLLED])
def test_gradients_are_those_of_a_stack_that_keeps_all(gradients, remat):
    kept, recomputed = (jax.tree.leaves(gradients[name][0]) for name in ("none", remat))
    # The gradient of a key's bias is zero but for rounding.
    largest = max(np.abs(leaf).max() for leaf in kept)
    for one, other in zip(kept, recomputed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * largest)


def test_the_less_is_kept_the_less_memory_is_held(gradients):
    held = {remat: memory for remat, (_, memory) in gradients.items()}
    assert held["full"] < 0.7 * held["dots"] < 0.6 * held["none"], held
    assert held[UNROLLED] < 0.7 * held["none"], held
    # A CPU has no other memory to put products into.
    assert held["offload"] < 0.6 * held["none"], held


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="model.remat='some': must be one of none, full, dots"):
        TransformerOptions(8, 1, 2, 8, remat="some")
