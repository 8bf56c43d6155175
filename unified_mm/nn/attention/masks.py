"""Masks of block calls, by the rules' predicates, and plain attention under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.rules import (
    ALL,
    FIELDS,
    BlockCall,
    KeySlice,
    MaskTable,
    Predicate,
)
from unified_mm.nn.tokens import Group, TokenMetadata, spans
from unified_mm.parallel.mesh import platform


@struct.dataclass
class BlockMask:
    """The mask of one block call as a backend needs it; Q are its queries, K the keys it selects.

    Attributes:
      dense: bool [B, Q, K], the whole mask, or None where the backend computes it.
      queries, keys: metadata [B, Q] and [B, K], or None where the mask is dense.
      has_keys: bool [B, Q], whether a query sees any key, or None where the backend computes it.
      bias: float32 [B, Q, K], added to scores; None where nothing is.
      call: the block call, its slices counted from the first of the Q and of the K; static.
      backend: its name; static.
    """

    dense: Any
    queries: Any
    keys: Any
    has_keys: Any
    bias: Any
    call: BlockCall = struct.field(pytree_node=False)
    backend: str = struct.field(pytree_node=False)


def slice_keys(x: Float[Array, "B K *rest"], call: BlockCall) -> Float[Array, "B seen *rest"]:
    """Returns the slices of keys (or of values) that a block call sees, concatenated."""
    parts = [x[:, start:stop] for start, stop in picked(call)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def picked(call: BlockCall) -> list[tuple[int, int]]:
    """Returns the bounds of the slices of keys that a block call sees, neighbours merged."""
    merged: list[tuple[int, int]] = []
    for start, stop, *_ in call.keys:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def rebase(call: BlockCall) -> BlockCall:
    """Returns the call with its slices counted among its own queries and the keys it selects."""
    keys = []
    count = 0
    for each in call.keys:
        stop = count + each.stop - each.start
        keys.append(each._replace(start=count, stop=stop))
        count = stop
    return BlockCall((0, call.queries[1] - call.queries[0]), tuple(keys))


def of_call(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> tuple[TokenMetadata, TokenMetadata]:
    """Returns the metadata of a call's queries [B, Q] and of the keys that it selects [B, K]."""
    return (
        _cut(queries, [call.queries]),
        _cut(keys, picked(call)),
    )


def _cut(metadata: TokenMetadata, bounds: list[tuple[int, int]]) -> TokenMetadata:
    """Returns the metadata of slices, given by their bounds, that hold whole groups."""
    groups = []
    stop = 0
    for group in metadata.groups:
        start, stop = stop, stop + group.length
        if any(low <= start and stop <= high for low, high in bounds):
            groups.append(group)

    def cut(x: Array) -> Array:
        parts = [x[:, low:high] for low, high in bounds]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    return jax.tree.map(cut, metadata).replace(groups=tuple(groups))


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

    Where G < H, H / G heads of queries share a head of keys. A query that sees no key gets the mean
    of all values: see `zero_unattended`.
    """
    if query.dtype == jnp.float16 and platform() == "cpu":
        # No CPU has products of float16 that add up in float32.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        return masked_attention(query, key, value, mask, bias).astype(jnp.float16)
    added = None if bias is None else bias[:, None].astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, added, mask[:, None])


def zero_unattended(
    x: Float[Array, "B Q H A"], has_keys: Bool[Array, "B Q"]
) -> Float[Array, "B Q H A"]:
    """Sets to zero where a query sees no key: softmax under an empty mask is uniform and leaks."""
    return jnp.where(has_keys[:, :, None, None], x, 0)


def static_mask(call: BlockCall, queries: TokenMetadata, keys: TokenMetadata) -> np.ndarray | None:
    """Returns the mask [Q, K] by predicate and positions where these are static, else None.

    Documents and validity are data and are masked in addition. The slices of `call` count among its
    own queries and keys. Where positions are static there is one segment. A predicate that
    positions do not decide has no static mask.
    """
    rows = _positions(queries.groups, (0, call.queries[1]))
    parts = []
    for each in call.keys:
        if each.predicate == ALL:
            parts.append(np.ones((call.queries[1], each.stop - each.start), bool))
            continue
        columns = _positions(keys.groups, (each.start, each.stop))
        if rows is None or columns is None:
            return None
        seen = each.predicate.in_order(rows[:, None], columns[None])
        if seen is None:
            return None
        parts.append(seen)
    return np.concatenate(parts, axis=1)


def unknown_to_kernels(call: BlockCall) -> str:
    """Returns why a kernel cannot compute a call, and what to set instead; '' where it can."""
    for each in call.keys:
        if each.term is not None:
            return f"adds nothing to scores, and a rule adds {each.term}: set model.attention='xla'"
        if type(each.predicate).in_order is Predicate.in_order:
            return f"does not know the predicate {each.predicate}: set model.attention='auto'"
    return ""


def _positions(groups: Sequence[Group], bounds: tuple[int, int]) -> np.ndarray | None:
    """Returns the positions of the tokens of whole groups within bounds; None if they are data."""
    found = []
    stop = 0
    for group in groups:
        start, stop = stop, stop + group.length
        if bounds[0] <= start and stop <= bounds[1] and group.length:
            if group.start is None:
                return None
            found.append(group.start + np.arange(group.length))
    return np.concatenate(found)


def one_document(*metadata: TokenMetadata) -> bool:
    """Returns whether it is known statically that all tokens are of one document."""
    return all(group.start is not None for each in metadata for group in each.groups)


def widen(x: Float[Array, "B K G A"], heads: int) -> Float[Array, "B K H A"]:
    """Repeats heads of keys or values for the heads of queries that share them."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def pair_fields(
    call: BlockCall, each: KeySlice, queries: TokenMetadata, keys: TokenMetadata
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the metadata of a call's queries, [B, Q, 1], and of a slice of keys, [B, 1, K]."""
    rows, columns = slice(*call.queries), slice(each.start, each.stop)
    query = {name: getattr(queries, name)[:, rows, None] for name in FIELDS}
    key = {name: getattr(keys, name)[:, None, columns] for name in (*FIELDS, "valid")}
    return query, key


def block_mask(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> Bool[Array, "B Q K"]:
    """Returns the mask of a block call: valid keys of the same document, by predicate."""
    parts = []
    for each in call.keys:
        query, key = pair_fields(call, each, queries, keys)
        allowed = key["valid"] & (key["document"] == query["document"])
        parts.append(allowed & each.predicate(query, key))
    return jnp.concatenate(parts, axis=2)


def block_bias(
    call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> Float[Array, "B Q K"] | None:
    """Returns what is added to the scores of a block call; None where nothing is."""
    if not call.has_terms:
        return None
    parts = []
    for each in call.keys:
        query, key = pair_fields(call, each, queries, keys)
        shape = key["valid"].shape[0], query["position"].shape[1], key["valid"].shape[2]
        added = jnp.zeros((), jnp.float32) if each.term is None else each.term(query, key)
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
            mine = {name: getattr(queries, name)[:, rows, None] for name in FIELDS}
            others = {name: getattr(keys, name)[:, None, columns] for name in FIELDS}
            mask[:, rows, columns] = table.between(query, key)[0](mine, others)
    same = np.asarray(queries.document)[:, :, None] == np.asarray(keys.document)[:, None, :]
    return jnp.asarray(mask & same & np.asarray(keys.valid)[:, None, :])
