"""Attention weights for whoever wants to look at them; models compute none otherwise.

`model.apply(..., mutable=["attention"])` asks for them. Each attention then leaves its `Weights`
in the collection of that name, under its own path; those of a scanned stack bear its layers first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.modalities.tokens import Group
from unified_mm.models.layers_apart import layers_stacked
from unified_mm.models.masks import BlockCall, block_mask
from unified_mm.models.sight import Sight, pick, picked, widen
from unified_mm.parallel.sharding import path_of

ATTENTION = "attention"  # the collection


@struct.dataclass
class Weights:
    """How much each query takes from each key.

    Attributes:
      values: float32 [..., B, H, Q, K]; a row sums to 1, or to 0 where the query sees nothing.
      queries, keys: the token groups of Q and of K; static.
    """

    values: Any
    queries: tuple[Group, ...] = struct.field(pytree_node=False)
    keys: tuple[Group, ...] = struct.field(pytree_node=False)


def leave_weights(
    module: nn.Module,
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    calls: Sequence[BlockCall],
    sights: Sequence[Sight],
    groups: tuple[tuple[Group, ...], tuple[Group, ...]],
) -> None:
    """Leaves the weights of an attention in its module's collection, where someone asked.

    They come from the reference softmax, whichever backend computed the attention.

    Args:
      module: the one that attends.
      query, key: as its backend gets them, all Q and all K.
      calls, sights: its block calls, and what each sees.
      groups: of the queries and of the keys.
    """
    if module.is_initializing() or not module.is_mutable_collection(ATTENTION):
        return
    rows, heads = query.shape[0], query.shape[2]
    values = jnp.zeros((rows, heads, query.shape[1], key.shape[1]), jnp.float32)
    for call, sight in zip(calls, sights, strict=True):
        mask = sight.mask
        if mask is None:
            mask = block_mask(sight.call, sight.queries, sight.keys)
        part = softmax_weights(query[:, slice(*call.queries)], pick(key, call), mask)
        done = 0
        for start, stop in picked(call):
            piece = part[..., done : done + stop - start]
            values = values.at[:, :, slice(*call.queries), start:stop].set(piece)
            done += stop - start
    module.sow(ATTENTION, "weights", Weights(values, *groups))


def by_path(left: Mapping[str, Any]) -> dict[str, Weights]:
    """What modules left in the collection, by their paths; values [L, B, H, Q, K]."""
    leaves = jax.tree_util.tree_leaves_with_path(layers_stacked(left), is_leaf=_is_weights)
    # Flax keeps it under .../weights/0.
    found = {path_of(path[:-2]): weights for path, weights in leaves}
    return {
        path: weights if weights.values.ndim == 5 else jax.tree.map(lambda x: x[None], weights)
        for path, weights in found.items()
    }


def _is_weights(leaf: Any) -> bool:
    return isinstance(leaf, Weights)


def softmax_weights(
    query: Float[Array, "B Q H A"], key: Float[Array, "B K G A"], mask: Bool[Array, "B Q K"]
) -> Float[Array, "B H Q K"]:
    """softmax(q k / sqrt(A)) (Vaswani et al. 2017, equation 1); zero for what sees nothing."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    scores = jnp.einsum("BQHA,BKHA->BHQK", query, widen(key, query.shape[2]))
    seen = mask[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * query.shape[-1] ** -0.5, -jnp.inf), axis=-1)
    return jnp.where(seen, weights, 0.0)
