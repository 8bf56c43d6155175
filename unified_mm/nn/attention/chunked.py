"""Attention in blocks of queries: all scores, and their mask, are never in memory at once.

Rabe & Staats 2021, "Self-attention does not need O(n^2) memory", section 3: one block of queries
after the other, recomputed in the backward pass. Keys are not divided: a block has fewer queries
the more keys there are, so that its scores take the same memory at any length.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.nn.attention.masks import (
    BlockCall,
    BlockMask,
    block_bias,
    block_mask,
    masked_attention,
)
from unified_mm.nn.tokens import TokenMetadata

# Scores of one block, for each example and head: large enough for fast matrix products.
SCORES = 2**17


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    seen_by: BlockMask,
    scores: int | None = None,
) -> Float[Array, "B Q H A"]:
    """Computes attention of a block call; a query that sees no key gets zero.

    Args:
      query, key, value: of the block call.
      seen_by: with `queries` and `keys`.
      scores: the most scores in a block, per example and head, but at least those of one query;
        None means `SCORES`.
    """

    def block(part: tuple[Array, TokenMetadata]) -> Array:
        rows, queries = part
        call = BlockCall((0, rows.shape[1]), seen_by.call.keys)
        mask = block_mask(call, queries, seen_by.keys)
        bias = block_bias(call, queries, seen_by.keys)
        return masked_attention(rows, key, value, mask, bias)

    length = query.shape[1]
    blocks = block_count(length, key.shape[1], SCORES if scores is None else scores)
    if blocks == 1:
        return block((query, seen_by.queries))
    divided = jax.tree.map(lambda x: _divide(x, blocks), (query, seen_by.queries))
    # Under a loop nothing can be merged with the first computation.
    seen = jax.lax.map(jax.checkpoint(block, prevent_cse=False), divided)
    return jnp.moveaxis(seen, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[:, :length]


def block_count(queries: int, keys: int, scores: int) -> int:
    """Returns the number of blocks of queries."""
    return math.ceil(queries / max(1, scores // keys))


def _divide(x: Array, blocks: int) -> Array:
    """Splits [B, Q, ...] into [blocks, B, size, ...] of equal size, with zeros at the end."""
    size = math.ceil(x.shape[1] / blocks)
    room = [(0, 0)] * x.ndim
    room[1] = (0, blocks * size - x.shape[1])
    return jnp.moveaxis(jnp.pad(x, room).reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)
