"""Splash attention, jax's fused kernel for TPUs: blocks that a rule forbids are never computed."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from unified_mm.nn.attention.masks import (
    BlockCall,
    BlockMask,
    joined_mask,
    static_mask,
    unknown_to_kernels,
    widen,
)
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import TokenMetadata

LANES = 128  # the kernel's lengths are multiples of it: others are padded
FEWEST = 16  # tokens that are worth a whole multiple
BLOCKS = (512, 256, LANES)  # sizes of a block of queries or keys, the largest that divides
# So many tokens, padded, are a block: a pass of no more is one call. The blocks of a longer one may
# be smaller than those of its calls.
AT_ONCE = BLOCKS[0]
NOWHERE = np.iinfo(np.int32).min  # the document of keys that are not there


def refusal(
    options: TransformerOptions,
    call: BlockCall,
    queries: TokenMetadata,
    keys: TokenMetadata,
    platform: str,
) -> str:
    """Returns why Splash cannot compute a block call, and what to set instead; '' where it can."""
    if platform != "tpu":
        return f"needs a TPU, and this runs on {platform}: set model.attention='auto'"
    if why := unknown_to_kernels(call):
        return why
    if options.head_dim % 64:
        return (
            f"takes heads whose width is a multiple of 64, not {options.head_dim}: set "
            "model.head_width"
        )
    lengths = {"queries": queries.valid.shape[1], "keys": keys.valid.shape[1]}
    for name, length in lengths.items():
        if length < FEWEST:
            return (
                f"pads lengths to multiples of {LANES}, a waste for {length} {name}: set "
                "model.attention='auto'"
            )
    mask = static_mask(call, queries, keys)
    if mask is None:
        return (
            "has to know the tokens' order beforehand, and in packed documents or beside a cache "
            "it is data: set model.attention='auto'"
        )
    if not mask.any(1).all():
        return "cannot do queries that see no key at all: set model.attention='auto'"
    return ""


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    seen_by: BlockMask,
    *,
    interpret: bool = False,
) -> Float[Array, "B Q H A"]:
    """Computes attention of a block call, or of several at once.

    Queries and keys are padded: what is added is of no document that is asked for.

    Args:
      query, key, value: of the block call.
      seen_by: with `queries` and `keys`.
      interpret: whether to interpret the kernel, which works on any device.
    """
    calls = seen_by.joined or (seen_by.call,)
    mask = joined_mask(calls, seen_by.queries, seen_by.keys)
    assert mask is not None  # or `refusal` would have said so
    documents = (
        seen_by.queries.document,
        jnp.where(seen_by.keys.valid, seen_by.keys.document, NOWHERE),
    )

    def local(query: Array, key: Array, value: Array, *documents: Array) -> Array:
        """Runs the kernel on one device's share of examples and heads."""
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        run = jax.vmap(kernel(padded_mask(mask), query.shape[2], interpret))
        ids = SegmentIds(*(padded(each, NOWHERE) for each in documents))
        heads_first = (jnp.moveaxis(padded(each, 0), 2, 1) for each in (query, key, value))
        return jnp.moveaxis(run(*heads_first, ids), 1, 2)[:, : query.shape[1]]

    query = query * query.shape[-1] ** -0.5
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:  # a kernel is not divided by the compiler
        heads, rows = spec(query), spec(query)[:1]
        key, value = widen(key, query.shape[2]), widen(value, query.shape[2])
        local = jax.shard_map(
            local, in_specs=(heads, heads, heads, P(*rows), P(*rows)), out_specs=heads,
            check_vma=False,
        )  # fmt: skip
    return local(query, key, value, *documents)


def padded(x: Shaped[Array, "B N *rest"], filling: int) -> Shaped[Array, "B padded *rest"]:
    """Returns tokens up to a multiple of `LANES`, those added being filled with a number."""
    more = [(0, 0), (0, -x.shape[1] % LANES), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, more, constant_values=filling)


def padded_mask(mask: np.ndarray) -> np.ndarray:
    """Returns a mask [Q, K] up to multiples of `LANES`; what is added is as the last one is.

    So each query sees a key, and where all was seen all is. Documents hide the keys that are added.
    """
    return np.pad(mask, [(0, -size % LANES) for size in mask.shape], mode="edge")


def spec(x: Float[Array, "B N H A"]) -> P:
    """Returns how examples and heads are sharded; an axis that the mesh does not divide is not."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = nn.logical_to_mesh_axes(("batch", None, "attending_heads", None)) or P()
    shares = []
    for size, axis in zip(x.shape, axes, strict=False):
        named = (axis,) if isinstance(axis, str) else axis or ()
        count = int(np.prod([mesh.shape[name] for name in named]))
        shares.append(axis if size % count == 0 else None)
    return P(*shares)


def kernel(mask: np.ndarray, heads: int, interpret: bool) -> Callable[..., Array]:
    """Returns the kernel for one example, [H, Q, A] and [G, K, A], under a mask [Q, K]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    rows, columns = (
        length if length <= AT_ONCE else next(size for size in BLOCKS if length % size == 0)
        for length in mask.shape
    )
    sizes = pallas.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns,
        block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns,
        block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip
    one = pallas.FullMask(mask.shape) if mask.all() else pallas.NumpyMask(mask)
    made: Callable[..., Array] = pallas.make_splash_mha(
        pallas.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return made
