"""Tokens, which every modality becomes, and the metadata by which attention rules treat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float


class Group(NamedTuple):
    """A run of tokens that attention rules treat alike; static, so slices need no gather.

    Attributes:
      name: unique within a sequence.
      modality: of the tokens.
      length: how many tokens there are.
      start: position of the first token, where each further one is one later and all are of
        document 0 and segment 0; None where these are data.
      valid_first: whether it is known that its valid tokens stand before all others.
      placed: whether its tokens have time and coords.
      grid: of each item, how many tokens lie nowhere and come first, and the rows and columns of
        the patches that follow, row by row; empty where the tokens lie on no grid.
      first: position at which the tokens of its modality begin in a document; None where that
        is data, as in documents of several pictures.
      ordered: whether it is known of positions that are data that within a document each is later
        than that of the token before.
      places: how many positions it takes up, where some of its tokens were dropped; 0 for `length`.
    """

    name: str
    modality: str
    length: int
    start: int | None = None
    valid_first: bool = False
    placed: bool = False
    grid: tuple[int, ...] = ()
    first: int | None = 0
    ordered: bool = False
    places: int = 0


@struct.dataclass
class TokenMetadata:
    """The metadata of a sequence of tokens. Each array is [B, N].

    Attributes:
      position: int32, order within the document (the predicate `causal` compares it).
      segment: int32, number of the image or clip of the document that the token belongs to; for a
        text token, of the latest one before it. Images count from 1; 0 is before any image.
      document: int32, number of the packed document; no token attends to another document.
      valid: bool, false for padding and for absent data, which are never attended to or scored.
      groups: in sequence order, their lengths adding up to N; static.
      time: float32, seconds from the beginning of the item, 0 for what has no time; None where no
        token of the sequence has time or coords.
      coords: float32 [B, N, 3], where a token lies in its item, 0 for what lies nowhere: x and y of
        a picture in 0..1 (from the left, from the top), frequency as y of a sound, x, y and z of
        points in the units of the data; None as `time` is.
    """

    position: Any
    segment: Any
    document: Any
    valid: Any
    groups: tuple[Group, ...] = struct.field(pytree_node=False)
    time: Any = None
    coords: Any = None


@struct.dataclass
class Tokens:
    """A sequence of tokens.

    Attributes:
      embeddings: [B, N, D].
      metadata: each array [B, N].
    """

    embeddings: Any
    metadata: TokenMetadata


def single_document(
    valid: Bool[Array, "B N"],
    group: Group,
    time: Float[Any, " N"] | None = None,
    coords: Float[Any, "... N 3"] | None = None,
) -> TokenMetadata:
    """Returns the metadata of one segment of one document, positions counted from 0.

    Args:
      valid: which tokens are there.
      group: of the tokens.
      time, coords: float32, of the tokens of each example; both or neither. Coords may be of each
        example its own, [B, N, 3].
    """
    zeros = jnp.zeros(valid.shape, jnp.int32)
    return TokenMetadata(
        position=zeros + jnp.arange(valid.shape[1], dtype=jnp.int32),
        segment=zeros,
        document=zeros,
        valid=valid,
        groups=(
            group._replace(
                start=0, placed=time is not None, grid=group.grid if time is not None else ()
            ),
        ),
        time=None if time is None else jnp.broadcast_to(time, valid.shape),
        coords=None if coords is None else jnp.broadcast_to(coords, (*valid.shape, 3)),
    )


def with_places(parts: Sequence[TokenMetadata]) -> list[TokenMetadata]:
    """Returns metadata of which all have time and coords where any has: zeros for the others."""
    if all(part.time is None for part in parts):
        return list(parts)
    found = []
    for part in parts:
        zeros = jnp.zeros(part.valid.shape, jnp.float32)
        places = {"time": zeros, "coords": jnp.zeros((*zeros.shape, 3), jnp.float32)}
        found.append(part if part.time is not None else part.replace(**places))  # type: ignore[attr-defined]
    return found


def with_positions(metadata: TokenMetadata, **arrays: Array) -> TokenMetadata:
    """Returns metadata with other positions, segments or documents [B, N] that are data."""
    groups = tuple(group._replace(start=None, ordered=False) for group in metadata.groups)
    return metadata.replace(groups=groups, **arrays)  # type: ignore[attr-defined]


def patch_centres(down: int, across: int) -> Float[np.ndarray, "P 3"]:
    """Returns the coordinates of the centres of patches, row by row: x, y in 0..1, and 0."""
    y, x = np.meshgrid(
        (np.arange(down) + 0.5) / down, (np.arange(across) + 0.5) / across, indexing="ij"
    )
    return np.stack([x, y, 0 * x], axis=-1).reshape(-1, 3).astype(np.float32)


def grid_coords(group: Group) -> Float[np.ndarray, "N 3"]:
    """Returns the coords of a group whose tokens lie on a grid."""
    nowhere, down, across = group.grid
    item = np.pad(patch_centres(down, across), ((nowhere, 0), (0, 0)))
    return np.tile(item, (group.length // len(item), 1))


def spans(groups: Sequence[Group]) -> dict[str, slice]:
    """Returns the slice of the sequence that each group takes up, by name."""
    result, start = {}, 0
    for group in groups:
        result[group.name] = slice(start, start + group.length)
        start += group.length
    return result


POSITION_KEYS = ("position", "segment", "document")  # keys of a batch that place what it holds


def offset_positions(
    metadata: TokenMetadata, arrays: Mapping[str, Array], offset: int
) -> TokenMetadata:
    """Returns metadata with the positions that the batch gives, or else `offset` later.

    Args:
      metadata: of tokens [B, N] that are a document of their own.
      arrays: of the batch; its `POSITION_KEYS` [B, N] are used where it has them.
      offset: how many tokens come before, where the batch has no positions.
    """
    if "position" in arrays:
        placed = with_positions(metadata, **{key: arrays[key] for key in POSITION_KEYS})
        return placed.replace(groups=tuple(each._replace(first=None) for each in placed.groups))  # type: ignore[attr-defined]
    groups = tuple(
        group._replace(
            start=None if group.start is None else group.start + offset,
            first=None if group.first is None else group.first + offset,
        )
        for group in metadata.groups
    )
    return metadata.replace(position=metadata.position + offset, groups=groups)  # type: ignore[attr-defined]


def fold_items(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the items (images, clips) of a batch as rows: [B, I, ...] becomes [B * I, ...].

    A batch with one item per example, whose `present` is [B], stays as it is.
    Positions are dropped.
    """
    values = {key: value for key, value in arrays.items() if key not in POSITION_KEYS}
    if arrays["present"].ndim == 1:
        return values
    return {key: value.reshape(-1, *value.shape[2:]) for key, value in values.items()}


def unfold_items(
    x: Float[Array, "rows N D"], metadata: TokenMetadata, arrays: Mapping[str, Array], offset: int
) -> Tokens:
    """Inverts `fold_items` for tokens: the items of an example become one group, [B, I * N].

    Args:
      x, metadata: of B * I items of N tokens each.
      arrays: of the batch that they come from; its `POSITION_KEYS`, if any, are [B, I].
      offset: how many tokens come before, where the batch has no positions.
    """
    batch = arrays["present"].shape[0]
    tokens = x.shape[1]
    slots = x.shape[0] // batch
    (group,) = metadata.groups
    group = group._replace(length=slots * tokens, valid_first=group.valid_first and slots == 1)
    placement = {
        key: jnp.repeat(arrays[key], tokens, axis=1) for key in POSITION_KEYS if key in arrays
    }
    joined = single_document(metadata.valid.reshape(batch, slots * tokens), group)
    if metadata.time is not None:
        joined = joined.replace(  # type: ignore[attr-defined]
            time=metadata.time.reshape(batch, slots * tokens),
            coords=metadata.coords.reshape(batch, slots * tokens, 3),
            groups=tuple(each._replace(placed=True, grid=group.grid) for each in joined.groups),
        )
    return Tokens(x.reshape(batch, slots * tokens, -1), offset_positions(joined, placement, offset))


def take(metadata: TokenMetadata, names: Sequence[str]) -> TokenMetadata:
    """Returns the metadata of the neighbouring groups `names` alone.

    Raises:
      ValueError: there is no group of one of the names.
    """
    groups = tuple(group for group in metadata.groups if group.name in names)
    if len(groups) != len(names):
        raise ValueError(f"no token groups {list(names)} in {[g.name for g in metadata.groups]}")
    where = spans(metadata.groups)
    cut = slice(where[groups[0].name].start, where[groups[-1].name].stop) if groups else slice(0)
    return jax.tree.map(lambda x: x[:, cut], metadata).replace(groups=groups)


def join_metadata(parts: Sequence[TokenMetadata]) -> TokenMetadata:
    """Returns the metadata of sequences that are concatenated.

    Raises:
      ValueError: two groups share a name.
    """
    groups = tuple(group for part in parts for group in part.groups)
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"two token groups share a name: {names}")
    alike = [part.replace(groups=groups) for part in with_places(parts)]  # type: ignore[attr-defined]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *alike)


def lengthen(metadata: TokenMetadata, more: TokenMetadata) -> TokenMetadata:
    """Returns metadata with more tokens at the end, merged into the last group if its name agrees.

    Positions of the added tokens are data: they may be slots that are written later.
    """
    more = with_positions(more)
    (added,) = more.groups
    if not metadata.groups or metadata.groups[-1].name != added.name:
        return join_metadata([metadata, more])
    *before, last = metadata.groups
    apart_ = more.replace(groups=(added._replace(name=f"{added.name} to come"),))  # type: ignore[attr-defined]
    grown = last._replace(
        length=last.length + added.length, start=None, valid_first=False, ordered=False
    )
    return join_metadata([metadata, apart_]).replace(groups=(*before, grown))  # type: ignore[attr-defined]


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Concatenates sequences of tokens, in the order given."""
    return Tokens(
        embeddings=jnp.concatenate([part.embeddings for part in parts], axis=1),
        metadata=join_metadata([part.metadata for part in parts]),
    )


def blank(values: Float[Array, "B ..."], valid: Bool[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Returns `values` with zeros wherever `valid` (a prefix of the axes) is false.

    It is applied to raw input before the first projection: a NaN in padding would otherwise reach
    gradients as 0 * NaN.
    """
    extra = values.ndim - valid.ndim
    return jnp.where(valid.reshape(valid.shape + (1,) * extra), values, 0)
