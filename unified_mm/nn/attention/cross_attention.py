"""Attention to a memory: gated layers in a language model (Alayrac et al. 2022, section 3.1.2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from unified_mm.nn.attention.attention import (
    divided_sequences,
    head_norm,
    into_heads,
    out_of_heads,
    share_of_heads,
    whole_sequences,
)
from unified_mm.nn.attention.backends import attend, prepare_block
from unified_mm.nn.attention.cache import LayerKV, as_slots, put_rows, read_slots, take_rows
from unified_mm.nn.attention.masks import BlockMask, slice_keys
from unified_mm.nn.attention.rules import BlockCall, MaskTable, block_calls
from unified_mm.nn.feed_forward import make_mlp
from unified_mm.nn.layers import Norm, partitioned
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.sow import sow_attention
from unified_mm.nn.tokens import Group, TokenMetadata

GATE = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


@struct.dataclass
class Memory:
    """The features of the context that cross-attention attends to, or their keys and values.

    Attributes:
      features: [B, K, width], or None once every layer's keys and values are known.
      layers: keys and values of the cross layers, each [periods, B, G, K, A], or tuples by period
        of [B, G, K, A]; None while they are not known.
      metadata: of the K features.
    """

    features: Any
    layers: Any
    metadata: TokenMetadata

    @property
    def length(self) -> int:
        """The number of features, K."""
        return int(self.metadata.valid.shape[1])

    def select(self, rows: Array) -> Memory:
        """Returns the examples `rows` [rows] of the batch."""
        return Memory(
            features=None if self.features is None else self.features[rows],
            layers=jax.tree.map(lambda x: take_rows(x, rows), self.layers),
            metadata=jax.tree.map(lambda x: x[rows], self.metadata),
        )

    def put(self, rows: Array, other: Memory) -> Memory:
        """Returns the memory with the examples `rows` [rows] replaced by those of `other`."""
        return Memory(
            features=None if self.features is None else self.features.at[rows].set(other.features),
            layers=jax.tree.map(lambda x, y: put_rows(x, rows, y), self.layers, other.layers),
            metadata=jax.tree.map(lambda x, y: x.at[rows].set(y), self.metadata, other.metadata),
        )


@struct.dataclass
class CrossPlan:
    """The features and masks of one pass, shared by all its cross layers.

    Attributes:
      features: [B, K, width], or None where keys and values are cached.
      masks: of the block calls.
      calls: the block calls of the queries that see any feature; static. All others get zero.
      groups: of the queries and of the features; static.
    """

    features: Any
    masks: tuple[BlockMask, ...]
    calls: tuple[BlockCall, ...] = struct.field(pytree_node=False)
    groups: tuple[tuple[Group, ...], tuple[Group, ...]] = struct.field(pytree_node=False)


def plan_cross_attention(
    options: TransformerOptions, table: MaskTable, queries: TokenMetadata, memory: Memory
) -> CrossPlan:
    """Returns the plan of a pass, by the same rules as within one sequence.

    Raises:
      ValueError: `options.attention` names a backend that cannot do what the rules need.
    """
    calls = block_calls(table, queries.groups, memory.metadata.groups)
    calls = tuple(call for call in calls if call.keys)
    masks = tuple(prepare_block(options, call, queries, memory.metadata) for call in calls)
    groups = queries.groups, memory.metadata.groups
    return CrossPlan(memory.features, masks, calls, groups)


class GatedCrossLayer(nn.Module):
    """A gated layer: h + g(alpha) * attention(h, features), then the same with the feed-forward.

    See Alayrac et al. 2022, figure 4. No projection has a bias, so a token that sees no feature
    gets exactly zero from the attention.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q D"], plan: CrossPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B Q D"], LayerKV]:
        o = self.options
        norm = Norm(o.norm, o.norm_epsilon, o.dtype, name="attention_norm")
        y, kv = CrossAttention(o, name="attention")(norm(x), plan, cached)
        x = x + self._gate("attention_gate", x.shape[-1]) * y
        norm = Norm(o.norm, o.norm_epsilon, o.dtype, name="feed_forward_norm")
        y = make_mlp(o, name="feed_forward", use_bias=False)(norm(x))
        return x + self._gate("feed_forward_gate", x.shape[-1]) * y, kv

    def _gate(self, name: str, width: int) -> Float[Array, "#D"]:
        cross = self.options.cross
        axis = "embed" if cross.shape == "channel" else None
        size = width if cross.shape == "channel" else 1
        start = partitioned(nn.initializers.constant(cross.start), axis)
        return GATE[cross.gate](self.param(name, start, (size,))).astype(self.options.dtype)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory; a query that sees no feature gets zero."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q D"], plan: CrossPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B Q D"], LayerKV]:
        o = self.options
        query = into_heads(o.heads, o, False, "query")(x)
        if cached is None:
            key = into_heads(o.num_kv_heads, o, False, "key")(plan.features)
            value = into_heads(o.num_kv_heads, o, False, "value")(plan.features)
            if o.cross.query_key_norm:
                key = head_norm("key_norm", o)(key)
            cached = as_slots(key), as_slots(value)
        else:
            key, value = (read_slots(each, o.dtype) for each in cached)
        if o.cross.query_key_norm:
            query = head_norm("query_norm", o)(query)
        query = whole_sequences(query, o.heads)
        key, value = (share_of_heads(each, o.heads) for each in (key, value))
        seen = jnp.zeros_like(query)
        for call, seen_by in zip(plan.calls, plan.masks, strict=True):
            rows = slice(*call.queries)
            part = attend(query[:, rows], slice_keys(key, call), slice_keys(value, call), seen_by)
            seen = seen.at[:, rows].set(part)
        sow_attention(self, query, key, plan.calls, plan.masks, plan.groups)
        seen = divided_sequences(seen)
        return out_of_heads(x.shape[-1], o, False, "output")(seen), cached
