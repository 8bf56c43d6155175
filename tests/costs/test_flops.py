"""The counter of FLOPs against formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unified_mm.costs.flops import matmul_flops
from unified_mm.nn.attention import splash
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.layers import product
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.nn.transformer import Transformer
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import without_names

BATCH, TOKENS, WIDTH, LAYERS = 2, 10, 16, 3


def forward(params, x, **changes):
    options = TransformerOptions(WIDTH, LAYERS, 4, 4 * WIDTH, **changes)
    tokens = x.shape[1]
    metadata = single_document(jnp.ones((BATCH, tokens), bool), Group("t", "text", tokens))
    plan = plan_attention(options, MaskTable((View("t", "joint"),)), metadata, metadata)
    stack = Transformer(options)
    if params is None:
        return without_names(jax.eval_shape(stack.init, jax.random.key(0), x, plan))
    return stack.apply(params, x, plan)[0].sum()


# L (24 D^2 N + 4 N^2 D) a sequence: projections and feed-forward of 4 D, and attention.
FORWARD = BATCH * LAYERS * (24 * WIDTH**2 * TOKENS + 4 * TOKENS**2 * WIDTH)


@pytest.mark.parametrize("changes", [{}, {"unroll": 3}, {"unroll": 2}])
def test_a_plain_stack_forward_and_backward(changes):
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.float32)
    params = forward(None, x)
    assert matmul_flops(lambda p, x: forward(p, x, **changes), params, x) == FORWARD
    gradient = jax.grad(lambda p, x: forward(p, x, **changes), argnums=(0, 1))
    assert matmul_flops(gradient, params, x) == 3 * FORWARD


def test_listed_blocks_count_and_nothing_twice():
    """Of 256 tokens under a window of 64, each block of 64 sees three blocks."""
    window = {"attention": "blocks", "sparse": (("text", (("window", 64),)),)}
    x = jax.ShapeDtypeStruct((BATCH, 256, WIDTH), jnp.float32)
    params = forward(None, x)
    blocks = BATCH * LAYERS * (24 * WIDTH**2 * 256 + 4 * 256 * (3 * 64) * WIDTH)

    def total(params, x):
        return forward(params, x, **window, counted=True)

    assert matmul_flops(total, params, x) == blocks
    assert matmul_flops(jax.grad(total, argnums=(0, 1)), params, x) == 3 * blocks
    again = jax.grad(lambda params, x: forward(params, x, **window), argnums=(0, 1))
    assert matmul_flops(again, params, x) > 3 * blocks


def test_a_kernel_counts_at_each_point_of_its_grid():
    """Splash, of two heads: three blocks of keys, scores and their use in each."""
    rows, columns, width = 256, 384, 64
    run = splash.kernel(np.ones((rows, columns), bool), 2, False)
    shapes = [jax.ShapeDtypeStruct((2, size, width), jnp.bfloat16) for size in (rows, columns)]
    assert matmul_flops(run, *shapes, shapes[1]) == 2 * 4 * rows * columns * width


def test_a_shard_map_counts_on_each_device():
    mesh = make_mesh({"data": 4, "tensor": 2})
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32)

    def divided(x):
        specs = P(("data", "tensor"))
        return jax.shard_map(lambda x: x @ x.T @ x, in_specs=specs, out_specs=specs)(x)

    with jax.set_mesh(mesh):
        assert matmul_flops(divided, x) == 8 * 2 * (2 * 6)


def test_rematerialisation_costs_a_forward_pass_more():
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.float32)
    params = forward(None, x)
    gradient = jax.grad(lambda p, x: forward(p, x, remat="full"), argnums=(0, 1))
    # The last product of a block, and of attention's output, is not needed again.
    assert 3.5 * FORWARD < matmul_flops(gradient, params, x) <= 4 * FORWARD


def test_a_scan_counts_as_often_as_it_runs():
    w = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(
            lambda c, _: (jax.lax.scan(lambda d, _: (d @ w, None), c, None, length=3)[0], None),
            x,
            None,
            length=5,
        )[0]

    one = 2 * 2 * 4 * 4
    assert matmul_flops(scanned, jnp.ones((2, 4))) == 15 * one
    assert matmul_flops(jax.jit(jax.checkpoint(scanned)), jnp.ones((2, 4))) == 15 * one

    assert matmul_flops(lambda x: jnp.einsum("bij,bjk->bik", x, x), jnp.ones((3, 2, 2))) == 48


def test_a_while_is_refused_unless_its_steps_are_given():
    def looped(x):
        with jax.named_scope("loop"):
            return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ jnp.ones((4, 4)), x)

    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"holds matrix products \(in scope loop\).*`steps`"):
        matmul_flops(looped, x)
    assert matmul_flops(looped, x, steps={"loop": 2.5}) == 2.5 * 2 * 2 * 4 * 4
    # One without products costs none, however long it is.
    assert matmul_flops(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x), 0) == 0


def leaving(x):
    """Two products where the sum is positive, else one."""
    w = jnp.ones((4, 4))
    with jax.named_scope("exit"):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)


def thrice(x):
    return jax.lax.scan(lambda x, _: (leaving(x), None), x, None, length=3)[0]


@pytest.mark.parametrize(("program", "times"), [(leaving, 1), (thrice, 3)])
def test_a_conditional_counts_its_largest_branch_or_by_measured_shares(program, times):
    x, one = jnp.ones((2, 4)), 2 * 2 * 4 * 4
    assert matmul_flops(program, x) == 2 * times * one
    shares = {"exit": (0.75, 0.25)}  # false, true
    assert matmul_flops(program, x, shares=shares) == 1.25 * times * one
    gradient = jax.value_and_grad(lambda x: program(x).sum())
    # Backward the weights are constants: as many products again.
    assert matmul_flops(gradient, x, shares=shares) == 2 * 1.25 * times * one
    with pytest.raises(ValueError, match="of a conditional with 2 branches"):
        matmul_flops(program, x, shares={"exit": (0.5, 0.6)})
    with pytest.raises(ValueError, match="'entry': the program has no conditional or loop"):
        matmul_flops(program, x, shares={"entry": (0.5, 0.5)})


def test_what_no_result_needs_counts_nothing():
    """Of a branch, of a step of a scan, and of a gradient where something learns nothing."""
    w, x, one = jnp.ones((4, 4)), jnp.ones((2, 4)), 2 * 2 * 4 * 4
    branches = (lambda x: (x @ w @ w, x)[1], lambda x: x @ w)
    assert matmul_flops(partial(jax.lax.cond, True, *branches), x) == one

    def looped(x):
        with jax.named_scope("loop"):
            return jax.lax.while_loop(
                lambda x: x.sum() < 0, partial(jax.lax.cond, True, *branches), x
            )

    assert matmul_flops(looped, x, steps={"loop": 5}) == 5 * one

    def stack(learned, frozen, x):
        @jax.checkpoint
        def layer(x, _):
            return product(product(x, frozen, 1), learned, 1), x @ w  # nobody reads the second

        return jax.lax.scan(layer, x, None, length=3)[0].sum()

    # A layer: both products, the first again, and backward two of what learns and one of the other.
    assert matmul_flops(jax.value_and_grad(stack), w, w, x) == 3 * (2 + 1 + 3) * one
    first = jax.value_and_grad(lambda w, x: product(x, w, 1).sum())  # none of its data
    assert matmul_flops(first, w, x) == 2 * one


def test_a_ragged_product_counts_each_row_once():
    x, kernels, sizes = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3])

    def product(x, kernels):
        return jax.lax.ragged_dot(x, kernels, sizes)

    assert matmul_flops(product, x, kernels) == 2 * 6 * 4 * 5
    gradient = jax.value_and_grad(lambda x, kernels: product(x, kernels).sum(), argnums=(0, 1))
    assert matmul_flops(gradient, x, kernels) == 3 * 2 * 6 * 4 * 5


@pytest.mark.parametrize(("stride", "places"), [(1, 6 * 3 - 2), (2, 3 * 3 - 1)])
def test_a_convolution_counts_what_lies_on_its_input(stride, places):
    """On a line of 6 a kernel of 3 meets 3 parts at each place, but for what is padded."""

    def loss(x, kernel):
        sides = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=sides)
        return jnp.square(y).sum()

    x = jax.ShapeDtypeStruct((BATCH, 6, 6, 5), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 5, 7), jnp.float32)
    forward = 2 * BATCH * 5 * 7 * places**2
    assert matmul_flops(loss, x, kernel) == forward
    assert matmul_flops(jax.grad(loss, argnums=(0, 1)), x, kernel) == 3 * forward


def test_a_grouped_convolution_counts_each_group_by_itself():
    def loss(x, kernel):
        grouped = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
        return jnp.square(jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", **grouped)).sum()

    x = jax.ShapeDtypeStruct((BATCH, 6, 6, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 1, 8), jnp.float32)
    forward = 2 * BATCH * 8 * 16 * 9
    assert matmul_flops(loss, x, kernel) == forward
    assert matmul_flops(jax.grad(loss, argnums=(0, 1)), x, kernel) == 3 * forward
