"""Tokens: what every modality becomes, and all that attention rules know about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float


class Group(NamedTuple):
    """A run of tokens that attention rules treat alike; static, so slices need no gather."""

    name: str
    modality: str
    length: int


@struct.dataclass
class TokenMetadata:
    """What is known of each token besides its embedding. Each array is [B, N].

    Attributes:
      position: int32, order within the document (what `causal` compares).
      segment: int32, which image, clip or passage of the document the token belongs to.
      document: int32, which of the packed documents; no token sees another document.
      valid: bool, false for padding and for what is absent: never seen, never scored.
      groups: static spans in sequence order; their lengths add up to N.
    """

    position: Any
    segment: Any
    document: Any
    valid: Any
    groups: tuple[Group, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Tokens:
    """Embeddings [B, N, D] and their metadata [B, N]."""

    embeddings: Any
    metadata: TokenMetadata


def single_document(valid: Bool[Array, "B N"], group: Group) -> TokenMetadata:
    """Metadata of one segment of one document, in sequence order."""
    zeros = jnp.zeros(valid.shape, jnp.int32)
    return TokenMetadata(
        position=zeros + jnp.arange(valid.shape[1], dtype=jnp.int32),
        segment=zeros,
        document=zeros,
        valid=valid,
        groups=(group,),
    )


def spans(groups: Sequence[Group]) -> dict[str, slice]:
    """Where each group lies in the sequence."""
    result, start = {}, 0
    for group in groups:
        result[group.name] = slice(start, start + group.length)
        start += group.length
    return result


def shift(metadata: TokenMetadata, offset: int) -> TokenMetadata:
    """The same tokens, `offset` positions later in their document."""
    return metadata.replace(position=metadata.position + offset)  # type: ignore[attr-defined]


def join_metadata(parts: Sequence[TokenMetadata]) -> TokenMetadata:
    """Metadata [B, N] of several groups side by side, N being the sum of theirs."""
    names = [group.name for part in parts for group in part.groups]
    if len(set(names)) != len(names):
        raise ValueError(f"two token groups share a name: {names}")

    def side_by_side(field: str) -> jax.Array:
        return jnp.concatenate([getattr(part, field) for part in parts], axis=1)

    return TokenMetadata(
        position=side_by_side("position"),
        segment=side_by_side("segment"),
        document=side_by_side("document"),
        valid=side_by_side("valid"),
        groups=tuple(group for part in parts for group in part.groups),
    )


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Several groups of tokens as one sequence, in the order given."""
    return Tokens(
        embeddings=jnp.concatenate([part.embeddings for part in parts], axis=1),
        metadata=join_metadata([part.metadata for part in parts]),
    )


def blank(values: Float[Array, "B ..."], valid: Bool[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Zero wherever `valid` (a prefix of the axes) is false.

    Applied to raw input before the first projection: a NaN in padding would otherwise reach
    gradients as 0 * NaN.
    """
    extra = values.ndim - valid.ndim
    return jnp.where(valid.reshape(valid.shape + (1,) * extra), values, 0)
