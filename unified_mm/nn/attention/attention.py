"""Multi-head attention by block calls, with an explicit cache of keys and values."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from unified_mm.nn.attention import chunked, masks
from unified_mm.nn.attention.backends import KERNEL_OF, LONG, PLAIN, kernel_mask, mask_at_once
from unified_mm.nn.attention.cache import LayerKV, read_slots, write_slots
from unified_mm.nn.attention.masks import (
    BlockCall,
    BlockMask,
    KeySlice,
    block_bias,
    block_mask,
    cut,
    slice_keys,
)
from unified_mm.nn.attention.patterns import refined, without_patterns
from unified_mm.nn.attention.rotary import rotary_places, rotary_rates, rotate
from unified_mm.nn.attention.rules import ALL, NONE, MaskTable, Window
from unified_mm.nn.layers import Dense, Norm, PerModality
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.sow import ATTENTION, sow_attention
from unified_mm.nn.tokens import Group, TokenMetadata, spans
from unified_mm.parallel.sharding import constrain


@struct.dataclass
class AttentionPlan:
    """The masks and positions of one pass, shared by all its layers.

    Attributes:
      masks: of the block calls.
      at_once: the mask of all of them for a kernel that computes them at once, else None.
      positions: int32 [B, Q] of the queries, or float32 [B, Q, 3], for rotary positions.
      valid: bool [B, Q], which of the queries are valid, for layers that leave padding out.
      write_at: int32 [], the slot of the cache where new keys begin; None without a cache.
      features: [B, K, width], what a cross layer attends to; None where its keys are cached.
      calls: the block calls; static.
      groups, key_groups: the groups of queries and of keys; static.
      keep: bounds of the keys and values to return when there is no cache yet; static.
      deterministic: whether nothing is drawn, as the stack that the plan is given to says; static.
    """

    masks: tuple[BlockMask, ...]
    at_once: BlockMask | None
    positions: Any
    valid: Any
    write_at: Any
    features: Any
    calls: tuple[BlockCall, ...] = struct.field(pytree_node=False)
    groups: tuple[Group, ...] = struct.field(pytree_node=False)
    key_groups: tuple[Group, ...] = struct.field(pytree_node=False)
    keep: tuple[int, int] = struct.field(pytree_node=False)
    deterministic: bool = struct.field(pytree_node=False, default=True)

    def span_of(self, number: int) -> slice:
        """Returns where among the queries the group `number` lies."""
        return list(spans(self.groups).values())[number]

    def reads_in_order(self, number: int) -> bool:
        """Returns whether tokens of the group `number` depend on those before them in it."""
        if self.groups[number].start is None:
            return True
        span = self.span_of(number)
        return any(
            overlap(span, call.queries)
            and overlap(span, (key.start, key.stop))
            and without_patterns(key.predicate) != ALL
            for call in self.calls
            for key in call.keys
        )


def overlap(span: slice, other: tuple[int, int]) -> bool:
    """Returns whether two parts of a sequence have tokens in common."""
    return bool(max(span.start, other[0]) < min(span.stop, other[1]))


def plan_attention(
    options: TransformerOptions,
    table: MaskTable,
    queries: TokenMetadata,
    keys: TokenMetadata,
    *,
    features: Float[Array, "B K width"] | None = None,
    write_at: Array | None = None,
    keep: tuple[int, int] = (0, 0),
) -> AttentionPlan:
    """Returns the plan of a pass: who sees whom, as block calls, and the mask of each.

    Args:
      options: of the stack.
      table: the rules of the pass.
      queries, keys: metadata of the two sequences.
      features: of the keys, for cross layers.
      write_at: int32 [], the slot of the cache where new keys begin.
      keep: bounds of the keys and values to return when there is no cache yet.

    Raises:
      ValueError: `options.attention` names a backend that cannot do what the rules need.
    """
    # Static: the first pattern that fits two groups gives their predicate and their score term, and
    # neighbouring queries that see the same share a call. Queries that see nothing have none.
    views = {view.name: view for view in table.views}
    calls: list[BlockCall] = []
    first = 0
    for query in queries.groups:
        mine = views.get(query.name)
        asking = {"*", query.modality, "written" if mine else "read"}
        row: list[KeySlice] = []
        start = 0
        for key in keys.groups:
            other = views.get(key.name)
            rule = (mine or other or table.views[0]).resolved
            asked = {"*", key.modality, "written" if other else "read"}
            asked |= {"same"} if query.modality == key.modality else set()
            predicate = next((p for (q, k), p in rule.table if q in asking and k in asked), NONE)
            if options.window and predicate != NONE:
                predicate = Window(predicate, options.window)
            sparse = options.patterns.get(query.modality)
            if sparse and predicate != NONE and query.modality == key.modality:
                predicate = refined(predicate, sparse, query)
            term = next((t for (q, k), t in rule.terms if q in asking and k in asked), None)
            stop = start + key.length
            if predicate == NONE or (mine and other and mine != other):
                pass  # texts never see one another
            elif row and row[-1][1:] == (start, predicate, term):
                row[-1] = row[-1]._replace(stop=stop)
            else:
                row.append(KeySlice(start, stop, predicate, term))
            start = stop
        last = first + query.length
        if calls and calls[-1] == BlockCall((calls[-1].queries[0], first), tuple(row)):
            calls[-1] = BlockCall((calls[-1].queries[0], last), tuple(row))
        elif row:
            calls.append(BlockCall((first, last), tuple(row)))
        first = last
    # The backend of each call, and what it needs of the metadata.
    device = jax.sharding.get_abstract_mesh().abstract_device  # this machine need not have it
    platform = jax.default_backend() if device is None else device.platform
    backend = options.attention
    kernel = None if backend in PLAIN else backend
    if backend == "auto":
        kernel = KERNEL_OF.get(platform)
    if options.counted and kernel != "blocks":
        kernel = None
    block_masks: list[BlockMask] = []
    for call in calls:
        scores = (call.queries[1] - call.queries[0]) * sum(k.stop - k.start for k in call.keys)
        seen_by = None
        if kernel:
            seen_by = kernel_mask(options, kernel, call, queries, keys, platform)
        if seen_by is None and backend == "auto" and scores > LONG:
            seen_by = kernel_mask(options, "blocks", call, queries, keys, platform)
        chunks = backend == "chunked" or (backend == "auto" and scores > LONG)
        if seen_by is None and chunks and not options.counted:
            own, rows, columns = cut(call, queries, keys)
            seen_by = BlockMask(own, "chunked", chunked.attend, queries=rows, keys=columns)
        if seen_by is None:
            adds = any(each.term is not None for each in call.keys)
            seen_by = BlockMask(
                call,
                "xla",
                masks.attend,
                dense=block_mask(call, queries, keys),
                bias=block_bias(call, queries, keys) if adds else None,
            )
        block_masks.append(seen_by)
    return AttentionPlan(
        masks=tuple(block_masks),
        at_once=mask_at_once(block_masks, tuple(calls), queries, keys),
        positions=rotary_places(queries) if options.rotary_axes == "places" else queries.position,
        valid=queries.valid,
        write_at=write_at,
        features=features,
        calls=tuple(calls),
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
    """Returns a projection [..., H, A] -> [..., width], of the initial scale of a branch."""
    return Dense(
        (width,),
        ("heads", None),
        ("embed",),
        scale=options.branch_scale,
        use_bias=use_bias,
        dtype=options.dtype,
        name=name,
    )


def head_norm(name: str, options: TransformerOptions, kind: str = "rms") -> Norm:
    """Returns a norm over the width of each head."""
    return Norm(kind, options.norm_epsilon, options.dtype, axis=None, name=name)


class Attention(nn.Module):
    """Multi-head attention under a plan: [B, N, D] -> [B, N, D], keys and values."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], plan: AttentionPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B N D"], LayerKV]:
        o = self.options

        sizes = {"query": o.heads, "key": o.num_kv_heads, "value": o.num_kv_heads}
        query, key, value = (
            PerModality(
                partial(into_heads, heads, o, o.query_bias), o.separate_attention, name=name
            )(x, plan.groups)
            for name, heads in sizes.items()
        )
        if o.query_key_norm:
            query = head_norm("query_norm", o)(query)
            key = head_norm("key_norm", o)(key)
        if o.rotary_base:
            rates = rotary_rates(o.head_dim, o.rotary_base, dict(o.rotary_options))
            query, key = (rotate(each, plan.positions, rates) for each in (query, key))
        query, key, value = (whole_sequences(each, o.heads) for each in (query, key, value))
        kv: LayerKV
        if cached is None:
            kept = slice(*plan.keep)  # in the layout of a cache
            kv = key[:, kept].swapaxes(1, 2), value[:, kept].swapaxes(1, 2)
        else:
            kv = (
                write_slots(cached[0], key, plan.write_at),
                write_slots(cached[1], value, plan.write_at),
            )
            key, value = (read_slots(each, o.dtype) for each in kv)
        seen = attend(self, query, key, value, plan)
        seen = constrain(seen, "batch", "length", "heads", None)
        output = partial(out_of_heads, x.shape[-1], o, o.output_bias)
        return PerModality(output, o.separate_attention, name="output")(seen, plan.groups), kv


def attend(
    module: nn.Module,
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    plan: AttentionPlan,
) -> Float[Array, "B Q H A"]:
    """Computes attention, call by call or at once; a query that sees no key gets zero.

    Args:
      module: the attention module, which hands out the weights where they are asked for.
      query, key, value: all Q and all K.
      plan: of the pass.
    """
    calls, seen_by_calls = plan.calls, plan.masks
    if plan.at_once is not None:
        calls, seen_by_calls = (plan.at_once.call,), (plan.at_once,)
    parts = []
    for call, seen_by in zip(calls, seen_by_calls, strict=True):
        rows, keys, values = (
            query[:, slice(*call.queries)],
            slice_keys(key, call),
            slice_keys(value, call),
        )
        name = re.sub(r"\W.*", "", seen_by.backend)
        with jax.named_scope(f"attention_{name}_{rows.shape[1]}x{keys.shape[1]}"):
            part = seen_by.attend(rows, keys, values, seen_by)
            if seen_by.has_keys is not None:
                part = jnp.where(seen_by.has_keys[:, :, None, None], part, 0)
        parts.append(part)
    if sum(part.shape[1] for part in parts) == query.shape[1]:
        seen = jnp.concatenate(parts, axis=1)
    else:
        seen = jnp.zeros_like(query)
        for call, part in zip(calls, parts, strict=True):
            seen = seen.at[:, slice(*call.queries)].set(part)
    if module.is_mutable_collection(ATTENTION) and not module.is_initializing():
        groups = plan.groups, plan.key_groups
        sow_attention(module, query, key, plan.calls, plan.masks, groups)
    return seen


def whole_sequences(
    x: Float[Array, "B N G A"], heads: int, *, divided: bool = True
) -> Float[Array, "B N G A"]:
    """Constrains queries, keys or values to all tokens and a share of the heads per device.

    Where they are `divided`, into a share of the tokens, that layout is constrained before, so that
    there is one exchange between the two, forward and backward.
    """
    fewer = None if x.shape[2] == heads else "key_value_heads"
    if divided:
        x = constrain(x, "batch", "length", fewer or "heads", None)
    return constrain(x, "batch", None, fewer or "attending_heads", None)
