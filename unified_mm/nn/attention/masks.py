"""Masks of block calls, by the rules' predicates, and plain attention under a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Shaped

from unified_mm.nn.attention.rules import ALL, FIELDS, MaskTable, Predicate, ScoreTerm
from unified_mm.nn.tokens import Group, TokenMetadata, grid_coords, spans
from unified_mm.parallel.mesh import platform


class KeySlice(NamedTuple):
    """A slice of keys that a block call sees, with its predicate and its score term."""

    start: int
    stop: int
    predicate: Predicate
    term: ScoreTerm | None = None


@dataclass(frozen=True)
class BlockCall:
    """Queries that share one row of the table, and the keys that they see; all static.

    Attributes:
      queries: bounds of a slice of the query sequence.
      keys: slices of the key sequence.
    """

    queries: tuple[int, int]
    keys: tuple[KeySlice, ...]

    @property
    def has_terms(self) -> bool:
        """Whether anything is added to scores."""
        return any(each.term is not None for each in self.keys)


@struct.dataclass
class BlockMask:
    """The mask of one block call as a backend needs it; Q are its queries, K the keys it selects.

    Attributes:
      call: the block call, its slices counted among `queries` and `keys`, or where these are None
        among all tokens; static.
      backend: its name; static.
      attend: the backend's function (query, key, value, block mask) -> output; static.
      dense: bool [B, Q, K], the whole mask, or None where the backend computes it.
      bias: float32 [B, Q, K], added to scores; None where nothing is.
      queries, keys: metadata [B, Q] and [B, K], or None where the mask is dense.
      has_keys: bool [B, Q], whether a query sees any key: where it sees none, the output becomes
        zero. None where the backend sees to that.
      counted: as in `TransformerOptions`; static.
      joined: the block calls that are computed at once, counted among `queries` and `keys`, where
        `call` is more than one: its bounds are theirs then, its predicate is not; static.
    """

    call: BlockCall = struct.field(pytree_node=False)
    backend: str = struct.field(pytree_node=False)
    attend: Callable[..., Any] = struct.field(pytree_node=False)
    dense: Any = None
    bias: Any = None
    queries: Any = None
    keys: Any = None
    has_keys: Any = None
    counted: bool = struct.field(pytree_node=False, default=False)
    joined: tuple[BlockCall, ...] = struct.field(pytree_node=False, default=())


def slice_keys(x: Shaped[Array, "B K *rest"], call: BlockCall) -> Shaped[Array, "B seen *rest"]:
    """Returns the slices of keys (or values, or metadata) that a block call sees, concatenated."""
    bounds: list[tuple[int, int]] = []
    for start, stop, *_ in call.keys:
        if bounds and bounds[-1][1] == start:
            bounds[-1] = (bounds[-1][0], stop)
        else:
            bounds.append((start, stop))
    parts = [x[:, start:stop] for start, stop in bounds]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def cut(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> tuple[BlockCall, TokenMetadata, TokenMetadata]:
    """Returns the metadata of a call's own queries and keys, and the call counted among these."""
    own = jax.tree.map(lambda x: x[:, slice(*call.queries)], queries)
    seen = jax.tree.map(lambda x: slice_keys(x, call), keys)
    slices, count = [], 0
    for each in call.keys:
        start, count = count, count + each.stop - each.start
        slices.append(each._replace(start=start, stop=count))
    return (
        BlockCall((0, call.queries[1] - call.queries[0]), tuple(slices)),
        own.replace(groups=groups_within(queries.groups, [call.queries])),
        seen.replace(groups=groups_within(keys.groups, [each[:2] for each in call.keys])),
    )


def groups_within(groups: Sequence[Group], bounds: Sequence[tuple[int, int]]) -> tuple[Group, ...]:
    """Returns the groups that lie within one of the bounds."""
    return tuple(
        group
        for group, where in zip(groups, spans(groups).values(), strict=True)
        if any(low <= where.start and where.stop <= high for low, high in bounds)
    )


def has_keys(call: BlockCall, queries: TokenMetadata, keys: TokenMetadata) -> Bool[Array, "B Q"]:
    """Returns which queries of a call see any key.

    It goes slice by slice of the keys, so that the whole mask is never in memory.
    """
    found = [
        block_mask(BlockCall(call.queries, (piece,)), queries, keys).any(-1) for piece in call.keys
    ]
    return jnp.stack(found).any(0)


def masked_attention(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    mask: Bool[Array, "B Q K"],
    bias: Float[Array, "B Q K"] | None = None,
) -> Float[Array, "B Q H A"]:
    """Computes scaled dot-product attention (Vaswani et al. 2017, eq. 1), softmax in float32.

    Where G < H, H / G heads of queries share a head of keys. A query that sees no key gets zero.
    """
    if query.dtype == jnp.float16 and platform() == "cpu":
        # No CPU has products of float16 that add up in float32.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        return masked_attention(query, key, value, mask, bias).astype(jnp.float16)
    if bias is not None:
        bias = bias.astype(query.dtype)
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    shared = query.reshape(batch, length, groups, heads // groups, width)
    return _attention(shared, key, value, mask, bias).reshape(query.shape)


@jax.custom_vjp
def _attention(
    query: Float[Array, "B Q G share A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    mask: Bool[Array, "B Q K"],
    bias: Float[Array, "B Q K"] | None,
) -> Float[Array, "B Q G share A"]:
    """Computes attention of G x R heads of queries; it has a gradient of its own.

    jax would differentiate the softmax step by step, and store what each step needs.
    """
    return _attention_forward(query, key, value, mask, bias)[0]


def _attention_forward(
    query: Array, key: Array, value: Array, mask: Array, bias: Array | None
) -> tuple[Array, Any]:
    """Returns the output, and what the gradient needs: of the scores, their softmax alone."""
    scores = _product("BQGRA,BKGA->BGRQK", query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, None, None].astype(jnp.float32)
    least = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, None, None], scores, least)
    largest = scores.max(-1, keepdims=True, initial=least)  # it is no more where no key is seen
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    weights = (weights * jnp.where(largest > least, 1 / total, 0)).astype(value.dtype)
    output = _product("BGRQK,BKGA->BQGRA", weights, value).astype(query.dtype)
    return output, (query, key, value, weights, bias)


def _attention_backward(kept: Any, cotangent: Array) -> tuple[Array | None, ...]:
    """Returns the gradients, by that of a softmax p: `p dp - p sum(p dp)`.

    Written as `p (dp - sum(p dp))` a CPU takes longer for it. With the output o and its gradient g
    that sum is `sum(g o)`, which is over fewer numbers, but takes longer, too: they lie in another
    order than the scores.
    """
    query, key, value, weights, bias = kept
    by_weight = _product("BQGRA,BKGA->BGRQK", cotangent, value)
    wide = weights.astype(jnp.float32)
    weighted = wide * by_weight
    by_score = weighted - wide * weighted.sum(-1, keepdims=True)
    narrow = by_score.astype(query.dtype)
    scale = query.shape[-1] ** -0.5
    return (
        (_product("BGRQK,BKGA->BQGRA", narrow, key) * scale).astype(query.dtype),
        (_product("BGRQK,BQGRA->BKGA", narrow, query) * scale).astype(key.dtype),
        _product("BGRQK,BQGRA->BKGA", weights, cotangent).astype(value.dtype),
        None,
        None if bias is None else by_score.sum((1, 2)).astype(bias.dtype),
    )


_attention.defvjp(_attention_forward, _attention_backward)


def _product(axes: str, left: Array, right: Array) -> Float[Array, "..."]:
    """Returns a product of arrays by the letters of their axes, in float32."""
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    seen_by: BlockMask,
) -> Float[Array, "B Q H A"]:
    """Computes attention of a block call by its dense mask: the backend `xla`."""
    return masked_attention(query, key, value, seen_by.dense, seen_by.bias)


def static_mask(call: BlockCall, queries: TokenMetadata, keys: TokenMetadata) -> np.ndarray | None:
    """Returns the mask [Q, K] by predicate and metadata that are static, else None.

    Documents and validity are data and are masked in addition. The slices of `call` count among its
    own queries and keys. Where positions are static there is one segment.
    """
    rows = static_fields(queries.groups, (0, call.queries[1]))
    parts = []
    for each in call.keys:
        if each.predicate == ALL:
            parts.append(np.ones((call.queries[1], each.stop - each.start), bool))
            continue
        columns = static_fields(keys.groups, (each.start, each.stop))
        if rows is None or columns is None:
            return None
        seen = each.predicate.static(
            {name: x[:, None] for name, x in rows.items()},
            {name: x[None] for name, x in columns.items()},
        )
        if seen is None:
            return None
        parts.append(seen)
    return np.concatenate(parts, axis=1)


def joined_mask(
    calls: Sequence[BlockCall], queries: TokenMetadata, keys: TokenMetadata
) -> np.ndarray | None:
    """Returns the mask [Q, K] of several calls together, as `static_mask` does of one."""
    mask = np.zeros((queries.valid.shape[1], keys.valid.shape[1]), bool)
    for call in calls:
        part = static_mask(*cut(call, queries, keys))
        if part is None:
            return None
        seen = np.concatenate([np.arange(each.start, each.stop) for each in call.keys])
        mask[slice(*call.queries), seen] = part
    return mask


def unknown_to_kernels(call: BlockCall) -> str:
    """Returns why a kernel cannot compute a call, and what to set instead; '' where it can."""
    for each in call.keys:
        if each.term is not None:
            return f"adds nothing to scores, and a rule adds {each.term}: set model.attention='xla'"
        kind = type(each.predicate)
        if kind.in_order is Predicate.in_order and kind.static is Predicate.static:
            return f"does not know the predicate {each.predicate}: set model.attention='auto'"
    return ""


def static_fields(groups: Sequence[Group], bounds: tuple[int, int]) -> dict[str, np.ndarray] | None:
    """Returns what `Predicate.static` reads of whole groups within bounds; None if it is data."""
    within = groups_within(groups, [bounds])
    if any(group.length and group.start is None for group in within):
        return None
    places = [(group.start or 0) + np.arange(group.length) for group in within]
    fields = {"position": np.concatenate(places)}
    if all(group.grid for group in within):
        fields["coords"] = np.concatenate([grid_coords(group) for group in within])
    return fields


def one_document(*metadata: TokenMetadata) -> bool:
    """Returns whether it is known statically that all tokens are of one document."""
    return all(group.start is not None for each in metadata for group in each.groups)


def widen(x: Float[Array, "B K G A"], heads: int) -> Float[Array, "B K H A"]:
    """Repeats heads of keys or values for the heads of queries that share them."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def fields_of(metadata: TokenMetadata) -> dict[str, Array]:
    """Returns the metadata [B, N] that predicates and score terms may read, what there is."""
    found = {name: getattr(metadata, name) for name in (*FIELDS, "valid")}
    return {name: x for name, x in found.items() if x is not None}


def block_mask(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> Bool[Array, "B Q K"]:
    """Returns the mask of a block call: valid keys of the same document, by predicate."""
    rows = slice(*call.queries)
    query = {name: x[:, rows, None] for name, x in fields_of(queries).items()}
    parts = []
    for start, stop, predicate, _ in call.keys:
        key = {name: x[:, None, start:stop] for name, x in fields_of(keys).items()}
        allowed = key["valid"] & (key["document"] == query["document"])
        parts.append(allowed & predicate(query, key))
    return jnp.concatenate(parts, axis=2)


def block_bias(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> Float[Array, "B Q K"] | None:
    """Returns what is added to the scores of a block call; None where nothing is."""
    if not call.has_terms:
        return None
    rows = slice(*call.queries)
    query = {name: x[:, rows, None] for name, x in fields_of(queries).items()}
    parts = []
    for start, stop, _, term in call.keys:
        key = {name: x[:, None, start:stop] for name, x in fields_of(keys).items()}
        shape = key["valid"].shape[0], query["position"].shape[1], stop - start
        added = jnp.zeros((), jnp.float32) if term is None else term(query, key)
        parts.append(jnp.broadcast_to(added.astype(jnp.float32), shape))
    return jnp.concatenate(parts, axis=2)


def reference_mask(
    table: MaskTable, queries: TokenMetadata, keys: TokenMetadata
) -> Bool[Array, "B Q K"]:
    """Returns the whole mask of a table, the reference that block calls are tested against."""
    mask = np.zeros((queries.valid.shape[0], queries.valid.shape[1], keys.valid.shape[1]), bool)
    query_spans, key_spans = spans(queries.groups), spans(keys.groups)
    for query in queries.groups:
        for key in keys.groups:
            rows, columns = query_spans[query.name], key_spans[key.name]
            mine = {name: x[:, rows, None] for name, x in fields_of(queries).items()}
            others = {name: x[:, None, columns] for name, x in fields_of(keys).items()}
            mask[:, rows, columns] = table.between(query, key)[0](mine, others)
    same = np.asarray(queries.document)[:, :, None] == np.asarray(keys.document)[:, None, :]
    return jnp.asarray(mask & same & np.asarray(keys.valid)[:, None, :])
