"""Tokens: what every modality becomes, and all that attention rules know about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float


class Group(NamedTuple):
    """A run of tokens that attention rules treat alike; static, so slices need no gather.

    Attributes:
      start: position of the first token, where each further one is one later and all are of
        document 0 and segment 0; None where these are data.
    """

    name: str
    modality: str
    length: int
    start: int | None = None


@struct.dataclass
class TokenMetadata:
    """What is known of each token besides its embedding. Each array is [B, N].

    Attributes:
      position: int32, order within the document (what `causal` compares).
      segment: int32, which image or clip of the document the token belongs to; of a text token,
        the latest one before it. Images of a document count from 1, so 0 is before any.
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
        groups=(group._replace(start=0),),
    )


def with_positions(metadata: TokenMetadata, **arrays: Array) -> TokenMetadata:
    """With other positions, segments or documents [B, N], which nobody knows beforehand."""
    groups = tuple(group._replace(start=None) for group in metadata.groups)
    return metadata.replace(groups=groups, **arrays)  # type: ignore[attr-defined]


def spans(groups: Sequence[Group]) -> dict[str, slice]:
    """Where each group lies in the sequence."""
    result, start = {}, 0
    for group in groups:
        result[group.name] = slice(start, start + group.length)
        start += group.length
    return result


POSITION_KEYS = ("position", "segment", "document")  # keys of a batch that place what it holds


def offset_positions(
    metadata: TokenMetadata, arrays: Mapping[str, Array], offset: int
) -> TokenMetadata:
    """Tokens where their batch puts them in a document, or else `offset` positions later.

    Args:
      metadata: of tokens [B, N] of a document of their own.
      arrays: of the batch; with `POSITION_KEYS` [B, N], these hold.
      offset: how many tokens come before, where the batch is silent.
    """
    if "position" in arrays:
        return with_positions(metadata, **{key: arrays[key] for key in POSITION_KEYS})
    groups = tuple(
        group._replace(start=None if group.start is None else group.start + offset)
        for group in metadata.groups
    )
    return metadata.replace(position=metadata.position + offset, groups=groups)  # type: ignore[attr-defined]


def fold_items(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The pictures (or clips) of a batch one by one: [B, S, ...] becomes [B * S, ...].

    A batch with one picture an example, whose `present` is [B], stays as it is.
    """
    values = {key: value for key, value in arrays.items() if key not in POSITION_KEYS}
    if arrays["present"].ndim == 1:
        return values
    return {key: value.reshape(-1, *value.shape[2:]) for key, value in values.items()}


def unfold_items(
    x: Float[Array, "R N D"], metadata: TokenMetadata, arrays: Mapping[str, Array], offset: int
) -> Tokens:
    """What `fold_items` took apart, as one group [B, S * N] an example, placed as the batch says.

    Args:
      x, metadata: of R = B * S pictures of N tokens.
      arrays: of the batch that they come from; its placement is [B, S].
      offset: how many tokens come before, where the batch is silent.
    """
    batch = arrays["present"].shape[0]
    tokens = x.shape[1]
    slots = x.shape[0] // batch
    (group,) = metadata.groups
    group = group._replace(length=slots * tokens)
    placement = {
        key: jnp.repeat(arrays[key], tokens, axis=1) for key in POSITION_KEYS if key in arrays
    }
    joined = single_document(metadata.valid.reshape(batch, slots * tokens), group)
    return Tokens(x.reshape(batch, slots * tokens, -1), offset_positions(joined, placement, offset))


def take(metadata: TokenMetadata, names: Sequence[str]) -> TokenMetadata:
    """Metadata of the neighbouring groups `names` alone."""
    groups = tuple(group for group in metadata.groups if group.name in names)
    if len(groups) != len(names):
        raise ValueError(f"no token groups {list(names)} in {[g.name for g in metadata.groups]}")
    where = spans(metadata.groups)
    cut = slice(where[groups[0].name].start, where[groups[-1].name].stop) if groups else slice(0)
    return TokenMetadata(
        position=metadata.position[:, cut],
        segment=metadata.segment[:, cut],
        document=metadata.document[:, cut],
        valid=metadata.valid[:, cut],
        groups=groups,
    )


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


def lengthen(metadata: TokenMetadata, more: TokenMetadata) -> TokenMetadata:
    """Metadata with further tokens at its end, as one group with the last where names agree.

    What they are is data: they may be slots that something is written into.
    """
    more = with_positions(more)
    (added,) = more.groups
    if not metadata.groups or metadata.groups[-1].name != added.name:
        return join_metadata([metadata, more])
    *before, last = metadata.groups
    apart_ = more.replace(groups=(added._replace(name=f"{added.name} to come"),))  # type: ignore[attr-defined]
    grown = last._replace(length=last.length + added.length, start=None)
    return join_metadata([metadata, apart_]).replace(groups=(*before, grown))  # type: ignore[attr-defined]


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
