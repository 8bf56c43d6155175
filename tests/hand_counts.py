"""Small programs with the bytes that each must move, counted by hand."""

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
