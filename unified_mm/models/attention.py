"""Multi-head attention by block calls, with an explicit cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.modalities.tokens import Group, TokenMetadata, join_metadata, single_document
from unified_mm.models.masks import BlockCall, Visibility, block_calls, block_mask
from unified_mm.models.per_modality import PerModality
from unified_mm.parallel.layers import Dense

KeysValues = tuple[Array, Array]


@struct.dataclass
class Cache:
    """Keys and values of tokens already seen, for every layer; a plain value, never mutated.

    Attributes:
      keys, values: [L, B, K, H, A].
      metadata: of the K slots; a slot that holds nothing yet is not valid.
      length: int32 [], slots written so far; new tokens go there.
    """

    keys: Any
    values: Any
    metadata: TokenMetadata
    length: Any

    def reserve(self, group: Group) -> Cache:
        """Room for `group.length` further tokens."""
        batch = self.metadata.valid.shape[0]
        empty = single_document(jnp.zeros((batch, group.length), bool), group)
        room = [(0, 0), (0, 0), (0, group.length), (0, 0), (0, 0)]
        return Cache(
            keys=jnp.pad(self.keys, room),
            values=jnp.pad(self.values, room),
            metadata=join_metadata([self.metadata, empty]),
            length=self.length,
        )

    def select(self, rows: Array) -> Cache:
        """The examples `rows` [B'] of the batch, for mined negatives or for beams."""
        return Cache(
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            metadata=jax.tree.map(lambda x: x[rows], self.metadata),
            length=self.length,
        )

    def write_metadata(self, new: TokenMetadata) -> TokenMetadata:
        """The slots' metadata once tokens `new` [B, N] are written after the present ones."""

        def put(slots: Array, values: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, values, self.length, axis=1)

        same_groups = new.replace(groups=self.metadata.groups)  # type: ignore[attr-defined]
        return jax.tree.map(put, self.metadata, same_groups)


@struct.dataclass
class AttentionPlan:
    """All that the layers of one pass need to know of who sees whom; the same for each layer.

    Attributes:
      masks: one bool [B, Q, K] for each block call.
      write_at: int32 [], where new keys go in the cache; None without a cache.
      calls, groups: the block calls, and the groups of the queries; static.
      keep: slice of the keys to hand back when there is no cache yet; static.
    """

    masks: tuple[Any, ...]
    write_at: Any
    calls: tuple[BlockCall, ...] = struct.field(pytree_node=False)
    groups: tuple[Group, ...] = struct.field(pytree_node=False)
    keep: tuple[int, int] = struct.field(pytree_node=False)


def plan_attention(
    visibility: Visibility,
    queries: TokenMetadata,
    keys: TokenMetadata,
    *,
    write_at: Array | None = None,
    keep: tuple[int, int] = (0, 0),
) -> AttentionPlan:
    """Block calls and their masks, made once a pass and shared by all layers."""
    calls = block_calls(visibility, queries.groups, keys.groups)
    return AttentionPlan(
        masks=tuple(block_mask(call, queries, keys) for call in calls),
        write_at=write_at,
        calls=calls,
        groups=queries.groups,
        keep=keep,
    )


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K H A"],
    value: Float[Array, "B K H A"],
    mask: Bool[Array, "B Q K"],
) -> Float[Array, "B Q H A"]:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), softmax in float32."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


class Attention(nn.Module):
    """Multi-head attention under a plan. [B, N, D] -> [B, N, D] and this layer's keys and values.

    Attributes:
      separate: whether each modality has projections of its own.
      output_scale: multiplies the initial size of the output projection.
    """

    heads: int
    separate: bool
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], plan: AttentionPlan, cached: KeysValues | None
    ) -> tuple[Float[Array, "B N D"], KeysValues]:
        width = x.shape[-1]
        head_width = width // self.heads

        def into_heads(**names: Any) -> nn.Module:
            return Dense(
                (self.heads, head_width), ("embed",), ("heads", None), dtype=self.dtype, **names
            )

        def out_of_heads(**names: Any) -> nn.Module:
            return Dense(
                (width,),
                ("heads", None),
                ("embed",),
                scale=self.output_scale,
                dtype=self.dtype,
                **names,
            )

        def project(make: Callable[..., nn.Module], name: str, inputs: Array) -> Array:
            return PerModality(make, self.separate, name=name)(inputs, plan.groups)

        query = project(into_heads, "query", x)
        key = project(into_heads, "key", x)
        value = project(into_heads, "value", x)
        kept: KeysValues
        if cached is None:
            kept = key[:, slice(*plan.keep)], value[:, slice(*plan.keep)]
        else:
            key = jax.lax.dynamic_update_slice_in_dim(cached[0], key, plan.write_at, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cached[1], value, plan.write_at, axis=1)
            kept = key, value
        seen = [
            attend(
                query[:, slice(*call.queries)],
                _pick(key, call),
                _pick(value, call),
                mask,
            )
            for call, mask in zip(plan.calls, plan.masks, strict=True)
        ]
        return project(out_of_heads, "output", jnp.concatenate(seen, axis=1)), kept


def _pick(x: Float[Array, "B K H A"], call: BlockCall) -> Float[Array, "B K2 H A"]:
    """The slices of keys that a block call sees; neighbouring slices are one."""
    bounds = [(start, stop) for start, stop, _ in call.keys]
    merged = [bounds[0]]
    for start, stop in bounds[1:]:
        if merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    if len(merged) == 1:
        return x[:, slice(*merged[0])]
    return jnp.concatenate([x[:, start:stop] for start, stop in merged], axis=1)
