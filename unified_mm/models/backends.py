"""Which program computes a block call of attention: by name, or by device, shape and rule."""

from __future__ import annotations

from jaxtyping import Array, Float

from unified_mm.modalities.tokens import TokenMetadata
from unified_mm.models import chunked
from unified_mm.models.masks import BlockCall, block_mask
from unified_mm.models.options import TransformerOptions
from unified_mm.models.sight import Sight, among_its_own, blind_to_zero, masked_attention, of_call

# Scores (queries x keys) of a call above which 'auto' works in blocks.
LONG = 2**19


def look(
    options: TransformerOptions, call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> Sight:
    """What a block call sees, as the backend wants it that `options` ask for.

    Args:
      call: its slices count among all of `queries` and `keys`.
      queries, keys: metadata of whole sequences.
    """
    queries, keys = of_call(call, queries, keys)
    call = among_its_own(call)
    name = choose(options, call, queries, keys)
    if name == "xla":
        mask = block_mask(call, queries, keys)
        return Sight(mask, None, None, mask.any(-1), call, name)
    return Sight(None, queries, keys, None, call, name)


def choose(
    options: TransformerOptions, call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> str:
    """The backend of a call."""
    if options.attention != "auto":
        return options.attention
    scores = queries.valid.shape[1] * keys.valid.shape[1]
    return "chunked" if scores > LONG else "xla"


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    sight: Sight,
) -> Float[Array, "B Q H A"]:
    """Attention of a block call's queries to the keys that it picks; blind ones get zero."""
    if sight.backend == "chunked":
        return chunked.attend(query, key, value, sight)
    return blind_to_zero(masked_attention(query, key, value, sight.mask), sight.sighted)
