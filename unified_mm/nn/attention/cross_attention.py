"""Attention to a memory: gated layers in a language model (Alayrac et al. 2022, section 3.1.2)."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from unified_mm.nn.attention.attention import (
    AttentionPlan,
    attend,
    head_norm,
    into_heads,
    out_of_heads,
    whole_sequences,
)
from unified_mm.nn.attention.cache import LayerKV, put_rows, read_slots, take_rows
from unified_mm.nn.feed_forward import Mlp
from unified_mm.nn.layers import Norm, partitioned
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import TokenMetadata
from unified_mm.parallel.sharding import constrain

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
        features, metadata = jax.tree.map(lambda x: x[rows], (self.features, self.metadata))
        return Memory(features, take_rows(self.layers, rows), metadata)

    def put(self, rows: Array, other: Memory) -> Memory:
        """Returns the memory with the examples `rows` [rows] replaced by those of `other`."""
        own, others = (self.features, self.metadata), (other.features, other.metadata)
        features, metadata = jax.tree.map(lambda x, y: x.at[rows].set(y), own, others)
        return Memory(features, put_rows(self.layers, rows, other.layers), metadata)


class GatedCrossLayer(nn.Module):
    """A gated layer: h + g(alpha) * attention(h, features), then the same with the feed-forward.

    See Alayrac et al. 2022, figure 4. No projection has a bias, so a token that sees no feature
    gets exactly zero from the attention.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q D"], plan: AttentionPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B Q D"], LayerKV]:
        o = self.options
        norm = partial(Norm, o.norm, o.norm_epsilon, o.dtype)
        y = norm(name="attention_norm")(x)
        y, kv = CrossAttention(o, name="attention")(y, plan, cached)
        x = x + self._gate("attention_gate", x.shape[-1]) * y
        y = norm(name="feed_forward_norm")(x)
        y = Mlp(o, use_bias=False, name="feed_forward")(y)
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
        self, x: Float[Array, "B Q D"], plan: AttentionPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B Q D"], LayerKV]:
        o = self.options
        query = into_heads(o.heads, o, False, "query")(x)
        if cached is None:
            key = into_heads(o.num_kv_heads, o, False, "key")(plan.features)
            value = into_heads(o.num_kv_heads, o, False, "value")(plan.features)
            if o.cross.query_key_norm:
                key = head_norm("key_norm", o)(key)
            cached = key.swapaxes(1, 2), value.swapaxes(1, 2)  # in the layout of a cache
        else:
            key, value = (read_slots(each, o.dtype) for each in cached)
        if o.cross.query_key_norm:
            query = head_norm("query_norm", o)(query)
        query = whole_sequences(query, o.heads)
        key, value = (whole_sequences(each, o.heads, divided=False) for each in (key, value))
        seen = attend(self, query, key, value, plan)
        seen = constrain(seen, "batch", "length", "heads", None)
        return out_of_heads(x.shape[-1], o, False, "output")(seen), cached
