"""What the queries of one block call see, and plain attention under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.rules import ALL, BlockCall, Predicate, block_mask
from unified_mm.nn.tokens import Group, TokenMetadata
from unified_mm.parallel.mesh import platform


@struct.dataclass
class BlockMask:
    """One block call as a backend gets it; Q are its queries, K the keys that it picks.

    Attributes:
      dense: bool [B, Q, K], where the backend takes it whole.
      bias: float32 [B, Q, K], what is added to scores, likewise; None where nothing is.
      queries, keys: metadata [B, Q] and [B, K], where the backend goes by these.
      has_keys: bool [B, Q], which queries see anything at all, where the backend is told.
      call: the block call, its slices counted among the Q and the K; static.
      backend: by name; static.
    """

    dense: Any
    queries: Any
    keys: Any
    has_keys: Any
    bias: Any
    call: BlockCall = struct.field(pytree_node=False)
    backend: str = struct.field(pytree_node=False)


def slice_keys(x: Float[Array, "B K *rest"], call: BlockCall) -> Float[Array, "B K2 *rest"]:
    """The slices of keys (or of what is known of them) that a block call sees."""
    parts = [x[:, start:stop] for start, stop in picked(call)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def picked(call: BlockCall) -> list[tuple[int, int]]:
    """Bounds of these slices; neighbouring ones are one."""
    merged: list[tuple[int, int]] = []
    for start, stop, *_ in call.keys:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def rebase(call: BlockCall) -> BlockCall:
    """The call with its slices counted among its own queries and among the keys it picks."""
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
    """Metadata of a call's queries [B, Q] and of the keys that it picks [B, K]."""
    return (
        _cut(queries, [call.queries]),
        _cut(keys, picked(call)),
    )


def _cut(metadata: TokenMetadata, bounds: list[tuple[int, int]]) -> TokenMetadata:
    """Metadata of slices that hold whole groups."""
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
    """Which queries of a call see any key; piece by piece, so that no mask need be held."""
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
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), softmax in float32.

    Where there are fewer heads of keys (G) than of queries (H), H / G of these share one. A query
    that sees nothing gets the mean of all values: see `zero_unattended`.
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
    """Zero where a query sees nothing (a softmax over nothing is uniform, and would leak)."""
    return jnp.where(has_keys[:, :, None, None], x, 0)


def static_mask(call: BlockCall, queries: TokenMetadata, keys: TokenMetadata) -> np.ndarray | None:
    """Who sees whom [Q, K] by rule and order where these are known beforehand, else None.

    Documents and validity are data and come on top. `call` counts among its own queries and keys.
    Where order is known there is one segment. A predicate that positions do not settle has none.
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
    """Returns what a kernel cannot compute of a call, and what to set instead; '' for nothing."""
    for each in call.keys:
        if each.term is not None:
            return f"adds nothing to scores, and a rule adds {each.term}: set model.attention='xla'"
        if type(each.predicate).in_order is Predicate.in_order:
            return f"does not know the predicate {each.predicate}: set model.attention='auto'"
    return ""


def _positions(groups: Sequence[Group], bounds: tuple[int, int]) -> np.ndarray | None:
    """Positions of the tokens of whole groups within bounds; None where they are data."""
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
    """Whether it is known beforehand that all tokens are of one document."""
    return all(group.start is not None for each in metadata for group in each.groups)


def widen(x: Float[Array, "B K G A"], heads: int) -> Float[Array, "B K H A"]:
    """Heads of keys or values repeated for the queries that share them."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
