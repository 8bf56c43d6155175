"""Routing: which rows go to which pools, each of which has room for a fixed number.

One choice serves all that computes by need: experts are E pools, and tokens that are dropped are
those that a single pool has no room for. Shapes are static, so that a compiler knows them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ORDERS = ("place", "score")


def choose(
    scores: Float[Array, "N E"], room: int, order: str, valid: Bool[Array, " N"]
) -> Int[Array, "E room"]:
    """Returns the rows that each pool takes, N where one of its slots stays empty.

    The choice is discrete and has no gradient.

    Args:
      scores: of each row with each pool; -inf where it does not ask for it.
      room: slots of a pool.
      order: who comes first: 'place', the earlier row, so that no row depends on a later one; or
        'score', the higher score, and among equals the earlier row.
      valid: rows that take no slot where it is false.
    """
    rows = scores.shape[0]
    scores = jax.lax.stop_gradient(scores).T
    asked = (scores > -jnp.inf) & valid
    places = jnp.where(asked, jnp.arange(rows), rows)
    if order == "score":
        descending = jnp.where(asked, -scores, jnp.inf)
        _, places = jax.lax.sort((descending, places), num_keys=1, is_stable=True)
    else:
        places = jnp.sort(places, axis=1)
    return jnp.pad(places[:, :room], ((0, 0), (0, max(0, room - rows))), constant_values=rows)


def gather(x: Float[Array, "N D"], slots: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns the row in each slot, zeros for an empty one."""
    return x.at[slots].get(mode="fill", fill_value=0)


def scatter_add(
    y: Float[Array, "... D"], slots: Int[Array, "..."], rows: int
) -> Float[Array, "N D"]:
    """Returns for each of N = `rows` rows the sum of what its slots hold, zeros if it has none."""
    return jnp.zeros((rows, y.shape[-1]), y.dtype).at[slots].add(y, mode="drop")


def rounded_up(room: float) -> int:
    """Returns a room in whole rows; a product's rounding, such as 100 * 0.07, adds none."""
    return math.ceil(round(room, 9))


class Blocks(NamedTuple):
    """Rows dealt out to blocks of one pool each, with room for all of them.

    Attributes:
      slots: int32 [blocks, rows of a block], the row in each slot, N for an empty one.
      pools: int32 [blocks], the pool of each.
    """

    slots: Int[Array, "blocks rows"]
    pools: Int[Array, " blocks"]


def into_blocks(asked: Bool[Array, "N E"], most: int, size: int) -> Blocks:
    """Deals all rows out to the pools that they ask for; none is dropped.

    Each pool's rows fill blocks of `size`, the last one in part (Gale et al. 2023, MegaBlocks).

    Args:
      asked: which pools each row asks for.
      most: the number of pools that a row asks for at most.
      size: rows of a block.
    """
    rows, pools = asked.shape
    counts = asked.sum(0)
    ends = jnp.cumsum(-(-counts // size))  # in blocks
    first = (ends - -(-counts // size)) * size
    slot = first + jnp.cumsum(asked, axis=0) - 1
    # Each pool with rows has at most one block that is not full.
    blocks = min(rows * most // size + pools, rows * most)
    slot = jnp.where(asked, slot, blocks * size)
    number = jnp.broadcast_to(jnp.arange(rows)[:, None], asked.shape)
    slots = jnp.full(blocks * size, rows).at[slot].set(number, mode="drop")
    of = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return Blocks(slots.reshape(blocks, size), jnp.minimum(of, pools - 1))
