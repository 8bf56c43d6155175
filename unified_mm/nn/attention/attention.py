"""Multi-head attention by block calls, with an explicit cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from unified_mm.nn.attention.backends import attend, prepare_block
from unified_mm.nn.attention.cache import LayerKV, as_slots, read_slots, write_slots
from unified_mm.nn.attention.masks import BlockMask, slice_keys
from unified_mm.nn.attention.rotary import rotary_rates, rotate
from unified_mm.nn.attention.rules import BlockCall, MaskTable, block_calls
from unified_mm.nn.layers import Dense, Norm, PerModality
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.sow import sow_attention
from unified_mm.nn.tokens import Group, TokenMetadata
from unified_mm.parallel.sharding import constrain


@struct.dataclass
class AttentionPlan:
    """The masks and positions of one pass, shared by all its layers.

    Attributes:
      masks: of the block calls.
      positions: int32 [B, Q] of the queries, for rotary positions.
      valid: bool [B, Q], which of the queries are valid, for layers that leave padding out.
      write_at: int32 [], the slot of the cache where new keys begin; None without a cache.
      calls: the block calls; static.
      groups, key_groups: the groups of queries and of keys; static.
      keep: bounds of the keys and values to return when there is no cache yet; static.
    """

    masks: tuple[BlockMask, ...]
    positions: Any
    valid: Any
    write_at: Any
    calls: tuple[BlockCall, ...] = struct.field(pytree_node=False)
    groups: tuple[Group, ...] = struct.field(pytree_node=False)
    key_groups: tuple[Group, ...] = struct.field(pytree_node=False)
    keep: tuple[int, int] = struct.field(pytree_node=False)


def plan_attention(
    options: TransformerOptions,
    table: MaskTable,
    queries: TokenMetadata,
    keys: TokenMetadata,
    *,
    write_at: Array | None = None,
    keep: tuple[int, int] = (0, 0),
) -> AttentionPlan:
    """Returns the plan of a pass.

    Args:
      options: of the stack.
      table: the rules of the pass.
      queries, keys: metadata of the two sequences.
      write_at: int32 [], the slot of the cache where new keys begin.
      keep: bounds of the keys and values to return when there is no cache yet.

    Raises:
      ValueError: `options.attention` names a backend that cannot do what the rules need.
    """
    # Queries that see nothing get zero: a call without keys is none.
    calls = tuple(call for call in block_calls(table, queries.groups, keys.groups) if call.keys)
    return AttentionPlan(
        masks=tuple(prepare_block(options, call, queries, keys) for call in calls),
        positions=queries.position,
        valid=queries.valid,
        write_at=write_at,
        calls=calls,
        groups=queries.groups,
        key_groups=keys.groups,
        keep=keep,
    )


def into_heads(heads: int, options: TransformerOptions, use_bias: bool, name: str) -> Dense:
    """Returns a projection [..., D] -> [..., heads, A].

    Fewer heads than H have a logical axis of their own.
    """
    axis = "heads" if heads == options.heads else "key_value_heads"
    return Dense(
        (heads, options.head_dim),
        ("embed",),
        (axis, None),
        use_bias=use_bias,
        dtype=options.dtype,
        name=name,
    )


def out_of_heads(width: int, options: TransformerOptions, use_bias: bool, name: str) -> Dense:
    """Returns a projection [..., H, A] -> [..., width], initially scaled by `branch_scale`."""
    return Dense(
        (width,),
        ("heads", None),
        ("embed",),
        scale=branch_scale(options),
        use_bias=use_bias,
        dtype=options.dtype,
        name=name,
    )


def head_norm(name: str, options: TransformerOptions, kind: str = "rms") -> Norm:
    """Returns a norm over the width of each head."""
    return Norm(kind, options.norm_epsilon, options.dtype, axis=None, name=name)


def branch_scale(options: TransformerOptions) -> float:
    """Returns the initial scale of each of the 2 L residual branches (GPT-2, section 2.3)."""
    return (2 * options.layers) ** -0.5


class Attention(nn.Module):
    """Multi-head attention under a plan: [B, N, D] -> [B, N, D], keys and values."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], plan: AttentionPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B N D"], LayerKV]:
        o = self.options

        def project(make: Callable[..., nn.Module], name: str, inputs: Array) -> Array:
            return PerModality(make, o.separate_attention, name=name)(inputs, plan.groups)

        query = project(partial(into_heads, o.heads, o, o.query_bias), "query", x)
        key = project(partial(into_heads, o.num_kv_heads, o, o.query_bias), "key", x)
        value = project(partial(into_heads, o.num_kv_heads, o, o.query_bias), "value", x)
        if o.query_key_norm:
            query, key = (
                head_norm(name, o)(heads)
                for name, heads in (("query_norm", query), ("key_norm", key))
            )
        if o.rotary_base:
            rates = rotary_rates(o.head_dim, o.rotary_base, dict(o.rotary_options))
            query, key = (rotate(each, plan.positions, rates) for each in (query, key))
        query, key, value = (whole_sequences(each, o.heads) for each in (query, key, value))
        kv: LayerKV
        if cached is None:
            kv = (
                as_slots(key[:, slice(*plan.keep)]),
                as_slots(value[:, slice(*plan.keep)]),
            )
        else:
            kv = (
                write_slots(cached[0], key, plan.write_at),
                write_slots(cached[1], value, plan.write_at),
            )
            key, value = (read_slots(each, o.dtype) for each in kv)
        parts = [
            attend(
                query[:, slice(*call.queries)],
                slice_keys(key, call),
                slice_keys(value, call),
                seen_by,
            )
            for call, seen_by in zip(plan.calls, plan.masks, strict=True)
        ]
        if sum(part.shape[1] for part in parts) == query.shape[1]:
            seen = jnp.concatenate(parts, axis=1)
        else:
            seen = jnp.zeros_like(query)
            for call, part in zip(plan.calls, parts, strict=True):
                seen = seen.at[:, slice(*call.queries)].set(part)
        groups = plan.groups, plan.key_groups
        sow_attention(self, query, key, plan.calls, plan.masks, groups)
        output = partial(out_of_heads, x.shape[-1], o, o.output_bias)
        return project(output, "output", divided_sequences(seen)), kv


def share_of_heads(x: Float[Array, "B N G A"], heads: int) -> Float[Array, "B N G A"]:
    """Constrains queries, keys or values to all tokens and a share of the heads per device."""
    axis = "attending_heads" if x.shape[2] == heads else "key_value_heads"
    return constrain(x, "batch", None, axis, None)


def whole_sequences(x: Float[Array, "B N G A"], heads: int) -> Float[Array, "B N G A"]:
    """Reshards queries, keys or values from a share of the tokens to a share of the heads.

    Both layouts are constrained, so that there is one exchange between them, forward and backward.
    """
    axis = "heads" if x.shape[2] == heads else "key_value_heads"
    return share_of_heads(constrain(x, "batch", "length", axis, None), heads)


def divided_sequences(x: Float[Array, "B N H A"]) -> Float[Array, "B N H A"]:
    """Constrains the output of attention to a share of the tokens per device."""
    return constrain(x, "batch", "length", "heads", None)
