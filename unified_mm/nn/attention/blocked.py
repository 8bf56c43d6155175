"""Sparse attention in blocks: of the keys, each block of queries gets those that it may see.

Which these are is known from the rule where positions are static, and for texts of packed documents
from their slots; where nothing is known it is all. Metadata decide within them, by the same
predicates, so the result is that of the whole mask. One block of queries after the other
is computed, and again in the backward pass, as in `chunked`: memory grows linearly.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from unified_mm.nn.attention.masks import (
    BlockCall,
    BlockMask,
    KeySlice,
    fields_of,
    groups_within,
    masked_attention,
    static_fields,
)
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, TokenMetadata

SIZE = 64  # tokens of a block
MOST = 0.5  # share of the blocks up to which 'auto' computes them alone
ZEROES_UNSEEN = True  # a query that sees no key gets zero without being asked


def refusal(
    options: TransformerOptions,
    call: BlockCall,
    queries: TokenMetadata,
    keys: TokenMetadata,
    platform: str,
) -> str:
    """Returns why blocks cannot compute a call, and what to set instead; '' where they can."""
    terms = [each.term for each in call.keys if each.term is not None]
    if terms:
        return f"adds nothing to scores, and a rule adds {terms[0]}: set model.attention='auto'"
    if options.attention == "auto":
        seen = key_blocks(call, queries.groups, keys.groups, SIZE).shape[1]
        if seen > MOST * -(-keys.valid.shape[1] // SIZE):
            return "leaves out too few blocks"
    return ""


@lru_cache(maxsize=256)
def key_blocks(
    call: BlockCall, queries: tuple[Group, ...], keys: tuple[Group, ...], size: int
) -> Int[np.ndarray, "blocks seen"]:
    """Returns the blocks of keys that each block of queries may see, in order.

    Rows are filled up with the number of blocks of keys, of which nothing is valid. The slices of
    `call` count among its own queries and keys.
    """
    length = call.keys[-1].stop
    count = -(-length // size)
    found = []
    for start in range(0, call.queries[1], size):
        rows = slice(start, min(start + size, call.queries[1]))
        parts = [_any_seen(call, rows, each, queries, keys) for each in call.keys]
        seen = np.pad(np.concatenate(parts), (0, count * size - length))
        found.append(np.flatnonzero(seen.reshape(count, size).any(1)))
    most = max(1, *map(len, found))
    filled = [np.pad(each, (0, most - len(each)), constant_values=count) for each in found]
    return np.stack(filled).astype(np.int32)


def _any_seen(
    call: BlockCall,
    rows: slice,
    keys_seen: KeySlice,
    queries: tuple[Group, ...],
    keys: tuple[Group, ...],
) -> Bool[np.ndarray, " K"]:
    """Returns which keys of a slice any of the queries `rows` may see, by what is static."""
    bounds = keys_seen.start, keys_seen.stop
    own, others = static_fields(queries, (0, call.queries[1])), static_fields(keys, bounds)
    seen = None
    if own is not None and others is not None:
        seen = keys_seen.predicate.static(
            {name: x[rows, None] for name, x in own.items()},
            {name: x[None] for name, x in others.items()},
        )
    elif len(queries) == 1 and queries[0].ordered and groups_within(keys, [bounds]) == queries:
        slots = np.arange(call.queries[1])
        seen = keys_seen.predicate.by_slots(slots[rows, None], slots[None])
    found = np.ones(1, bool) if seen is None else seen.any(0)
    return np.broadcast_to(found, bounds[1] - bounds[0])


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    seen_by: BlockMask,
) -> Float[Array, "B Q H A"]:
    """Computes attention of a block call; a query that sees no key gets zero.

    Args:
      query, key, value: of the block call.
      seen_by: with `queries` and `keys`.
    """
    call = seen_by.call
    listed = key_blocks(call, seen_by.queries.groups, seen_by.keys.groups, SIZE)
    blocks = len(listed)
    # The predicate of each key, by number: slices of keys lie within blocks as they come.
    predicates = tuple(dict.fromkeys(each.predicate for each in call.keys))
    lengths = [each.stop - each.start for each in call.keys]
    number = np.repeat([predicates.index(each.predicate) for each in call.keys], lengths)
    beside = fields_of(seen_by.keys) | {"predicate": jnp.asarray(number, jnp.int32)[None]}
    keys = {name: divide(x, -(-x.shape[1] // SIZE) + 1) for name, x in beside.items()}
    blocked_key, blocked_value = (divide(x, -(-x.shape[1] // SIZE) + 1) for x in (key, value))

    def block(part: tuple[Array, dict[str, Array], Array]) -> Array:
        rows, fields, listed = part
        own = {name: x[:, :, None] for name, x in fields.items()}
        seen = {name: take(x, listed)[:, None] for name, x in keys.items()}
        allowed = seen["valid"] & (seen["document"] == own["document"])
        by_rule: Bool[Array, "B Q K"] = jnp.zeros((1, 1, 1), bool)
        for index, each in enumerate(predicates):
            by_rule = by_rule | (each(own, seen) & (seen["predicate"] == index))
        mask = jnp.broadcast_to(allowed & by_rule, (*rows.shape[:2], allowed.shape[2]))
        return masked_attention(rows, take(blocked_key, listed), take(blocked_value, listed), mask)

    divided = jax.tree.map(
        lambda x: jnp.moveaxis(divide(x, blocks), 1, 0), (query, fields_of(seen_by.queries))
    )
    if not seen_by.counted:
        # Under a loop nothing can be merged with the first computation.
        block = jax.checkpoint(block, prevent_cse=False)
    seen = jax.lax.map(block, (*divided, jnp.asarray(listed)))
    return jnp.moveaxis(seen, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[
        :, : query.shape[1]
    ]


def divide(x: Shaped[Array, "B N *rest"], blocks: int) -> Shaped[Array, "B blocks size *rest"]:
    """Returns tokens in blocks of `SIZE`, with zeros at the end, which are not valid."""
    room = [(0, 0), (0, blocks * SIZE - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, room).reshape(x.shape[0], blocks, SIZE, *x.shape[2:])


def take(
    x: Shaped[Array, "B blocks size *rest"], listed: Int[Array, " seen"]
) -> Shaped[Array, "B K *rest"]:
    """Returns the tokens of the blocks that are listed."""
    found = jnp.take(x, listed, axis=1, mode="clip")
    return found.reshape(x.shape[0], -1, *x.shape[3:])
