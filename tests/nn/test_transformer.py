"""What a stack keeps for its backward pass, and what its layers leave for objectives."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.nn import sow_auxiliary
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import REMAT, TransformerOptions
from unified_mm.nn.pipeline import Pipeline
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
        if params is None:
            params = without_names(jax.jit(stack.init)(jax.random.key(0), x, plan))

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


class Leaving(nn.Module):
    """A feed-forward that leaves a number for each of so many groups."""

    options: Any
    groups: int = 1

    @nn.compact
    def __call__(self, x, plan):
        sow_auxiliary(self, "load", jnp.zeros((self.groups, 5)))
        return x


@pytest.mark.parametrize("changes", [{}, {"remat": "full"}, {"unstacked": True}, {"pipeline": 2}])
def test_layers_leave_as_many_groups_for_each_example(changes):
    rows = 4 // changes.get("pipeline", 1)  # the layers' share of four examples
    pipeline = Pipeline(1, changes["pipeline"]) if "pipeline" in changes else None
    changes = {**changes, "pipeline": pipeline, "feed_forward_type": f"{__name__}:Leaving"}
    x = jnp.ones((4, 3, 8))
    metadata = single_document(jnp.ones((4, 3), bool), Group("t", "text", 3))

    def run(groups):
        own = (("groups", groups),)
        options = TransformerOptions(8, 2, 2, 8, feed_forward_options=own, **changes)
        plan = plan_attention(options, MaskTable((View("t", "joint"),)), metadata, metadata)
        stack = Transformer(options)
        plain = Transformer(options.changed({"feed_forward_options": {"groups": 4}}))
        init = jax.eval_shape(plain.init, jax.random.key(0), x, plan)

        def twice(params):
            _, left = stack.apply({"params": params}, x, plan, mutable=["auxiliary"])
            # A second pass of the same stack may be over other examples.
            stack.apply({"params": params, **left}, x, plan, mutable=["auxiliary"])
            return left

        left = jax.eval_shape(twice, without_names(init["params"]))
        return [leaf.shape for leaf in jax.tree.leaves(left)]

    assert run(2 * rows) == ([(8, 5)] * 2 if "unstacked" in changes else [(2, 8, 5)])
    for groups in (rows + 1, 0):
        message = rf"block_0/feed_forward/load: the layer leaves values of shape \({groups}, 5\)"
        with pytest.raises(ValueError, match=f"{message} for {rows} examples; their first axis"):
            run(groups)
