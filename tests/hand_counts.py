"""Small programs with the bytes that each must move, and a tiny text's FLOPs, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.costs.hlo import Program
from unified_mm.costs.traffic import memory_traffic

ROWS, WIDTH, TIMES = 32768, 4096, 10
X, W = 2 * ROWS * WIDTH, 2 * WIDTH * WIDTH  # bytes in bfloat16


def product(x, w):
    return x @ w


def loop(x, w):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=TIMES)[0]


def layers(x, kernels):
    """Each layer's kernel is a slice of a stack; what is in between is not given back."""
    for kernel in kernels:
        x = jnp.tanh(x @ kernel)
    return x


def norm(x, scale):
    wide = x.astype(jnp.float32)
    mean = jnp.square(wide).mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-6) * scale[0].astype(jnp.float32)).astype(x.dtype)


def attention(query, key, value, cotangent):
    def attend(*args):
        return jax.nn.dot_product_attention(*args, implementation="cudnn")

    output, pull = jax.vjp(attend, query, key, value)
    return output, pull(cotangent)


def traffic(devices, function, *shapes):
    """The bytes that the counter reads off the program of a function for one device."""
    sharding = NamedSharding(Mesh(np.array(devices[:1]), "x"), P())
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return memory_traffic(Program.parse(jax.jit(function).lower(*args).compile().as_text()))


# Of `tiny.loaded`, which has an exit after the first of its two layers.
NARROW, PATCHES, ROOM, LAYERS = 16, 4, 11, 2
DENSE = 2 * (4 * NARROW * NARROW + 2 * NARROW * 32)  # a layer's, of a token
HEAD = 2 * NARROW * 320
KEYS = 2 * 2 * NARROW * NARROW  # keys and values of a token that has left


def scores(queries, keys):
    """Of a layer, and the sums that they weigh."""
    return 2 * 2 * NARROW * queries * keys


def text_by_hand(prompt, tokens, left=None, patches=PATCHES):
    """A text of so many tokens after a prompt of so many."""
    begun = 2 * patches * 8 * 8 * 3 * NARROW + HEAD
    begun += LAYERS * DENSE * (patches + prompt)
    begun += LAYERS * (scores(patches, patches) + scores(prompt, patches + prompt))
    layer = DENSE + scores(1, patches + prompt + ROOM)
    if left is None:
        step = 2 * layer + HEAD
    else:  # the exit is checked by the head, too
        step = layer + HEAD + (1 - left) * layer + left * KEYS + HEAD
    return begun + (tokens - 1) * step
