"""Sparse patterns: of what a rule lets a token see, what is near, global, or drawn by blocks.

Beltagy et al. 2020 (Longformer), Zaheer et al. 2020 (BigBird).
They are predicates, so every backend computes them by its mask; `blocked` computes the blocks alone
in which anything is seen. `model.sparse` says them by modality, for tokens of one modality among
themselves; a rule of one's own may have them in its table for any pair, as
`Sparse(CAUSAL, (Window(ALL, 256), First(4)))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from unified_mm.nn.attention.rules import ALL, Fields, Predicate, Window
from unified_mm.nn.options import SparseOptions
from unified_mm.nn.tokens import Group

StaticFields = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Sparse(Predicate):
    """The predicate under which a token sees, of what another lets it see, what a pattern keeps."""

    of: Predicate
    patterns: tuple[Predicate, ...]

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether it lets no token see a later one, as the other predicate does not."""
        return self.of.causal

    def __call__(self, query: Fields, key: Fields) -> Array:
        kept = jnp.zeros((1, 1, 1), bool)
        for each in self.patterns:
            kept = kept | each(query, key)
        return kept & self.of(query, key)

    def static(self, query: StaticFields, key: StaticFields) -> np.ndarray | None:
        seen = [each.static(query, key) for each in (self.of, *self.patterns)]
        if any(each is None for each in seen):
            return None
        return seen[0] & np.logical_or.reduce(seen[1:])  # type: ignore[operator, arg-type]

    def by_slots(self, query: np.ndarray, key: np.ndarray) -> np.ndarray | None:
        seen = self.of.by_slots(query, key)
        kept = [each.by_slots(query, key) for each in self.patterns]
        if any(each is None for each in kept):
            return seen
        any_kept: np.ndarray = np.logical_or.reduce(kept)  # type: ignore[arg-type]
        return any_kept if seen is None else seen & any_kept


@dataclass(frozen=True)
class Pattern(Predicate):
    """A predicate that is asked alike of arrays of jax and, where they are static, of numpy."""

    def __call__(self, query: Fields, key: Fields) -> Array:
        found: Array = self.keeps(query, key)
        return found

    def static(self, query: StaticFields, key: StaticFields) -> np.ndarray | None:
        found: np.ndarray = self.keeps(query, key)
        return found

    def keeps(self, query: Mapping[str, Any], key: Mapping[str, Any]) -> Any:
        """Returns bool, of the shape that the fields broadcast to."""
        raise NotImplementedError


@dataclass(frozen=True)
class First(Pattern):
    """The predicate under which the first `count` tokens are seen by all and see all.

    Attributes:
      count: of them.
      start: position of the first one in its document.
    """

    count: int
    start: int = 0

    def keeps(self, query: Mapping[str, Any], key: Mapping[str, Any]) -> Any:
        end = self.start + self.count
        return (query["position"] < end) | (key["position"] < end)


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """The predicate under which blocks of tokens see blocks that are drawn, and are seen by these.

    Each block draws `count` among itself and those before it, so that the draw of a token depends
    on no later one and a text may grow.

    Attributes:
      count: blocks that each draws; the same may be drawn twice.
      size: positions of a block.
      seed: of the draw.
      start: position of the first block's first token in its document.
    """

    count: int
    size: int
    seed: int = 0
    start: int = 0

    def keeps(self, query: Mapping[str, Any], key: Mapping[str, Any]) -> Any:
        blocks = [(each["position"] - self.start) // self.size for each in (query, key)]
        return self._drawn(*blocks) | self._drawn(*blocks[::-1])

    def _drawn(self, block: Any, other: Any) -> Any:
        """Returns whether blocks draw others, by a hash (MurmurHash3's last step)."""
        number = block.astype(np.uint32)
        found = other < 0  # none
        for index in range(self.count):
            salt = (self.seed * 0x9E3779B9 + index) % 2**32
            x = number * np.uint32(self.count) + np.uint32(salt)
            x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
            x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
            x = x ^ (x >> np.uint32(16))
            found = found | (other.astype(np.uint32) == x % (number + np.uint32(1)))
        return found


@dataclass(frozen=True)
class NearInSpace(Pattern):
    """The predicate under which a patch sees those that lie near; what lies nowhere, all see.

    Attributes:
      across, down: by how much coords may differ, in shares of a picture's width and height.
    """

    across: float
    down: float

    def keeps(self, query: Mapping[str, Any], key: Mapping[str, Any]) -> Any:
        if "coords" not in query or "coords" not in key:
            raise ValueError(
                "the attention rule compares places (NearInSpace), but the tokens have none: name "
                "modalities in its patterns that lie somewhere, such as image"
            )
        far = abs(query["coords"] - key["coords"])
        near = (far[..., 0] <= self.across) & (far[..., 1] <= self.down)
        nowhere = (query["coords"] == 0).all(-1) | (key["coords"] == 0).all(-1)
        return near | nowhere

    def static(self, query: StaticFields, key: StaticFields) -> np.ndarray | None:
        return self.keeps(query, key) if "coords" in query and "coords" in key else None


def without_patterns(predicate: Predicate) -> Predicate:
    """Returns what a rule lets a token see before patterns and windows, which are symmetric."""
    while isinstance(predicate, Sparse | Window):
        predicate = predicate.of
    return predicate


def refined(of: Predicate, sparse: SparseOptions, group: Group) -> Predicate:
    """Returns what `model.sparse` leaves a group to see of its own modality.

    Args:
      of: what its rule lets it see.
      sparse: the patterns.
      group: of the queries.

    Raises:
      ValueError: it asks for neighbours on a grid, and the tokens lie on none; or for the first
        tokens, and which these are is not known.
    """
    found: list[Predicate] = []
    if sparse.window:
        found.append(Window(ALL, sparse.window))
    if sparse.grid:
        if not group.grid:
            raise ValueError(
                f"model.sparse.{group.modality}.grid={sparse.grid}: its tokens lie on no grid of "
                "patches; set a window instead"
            )
        _, down, across = group.grid
        # Half a patch more, so that rounding decides nothing.
        found.append(NearInSpace((sparse.grid + 0.5) / across, (sparse.grid + 0.5) / down))
    if sparse.first or sparse.random:
        if group.first is None:
            raise ValueError(
                f"model.sparse.{group.modality}: first={sparse.first} and random={sparse.random} "
                "count its tokens from the first in a document, and where pictures stand among "
                "words nothing says which that is: set both to 0, and a window or a grid"
            )
        if sparse.first:
            found.append(First(sparse.first, group.first))
        if sparse.random:
            found.append(RandomBlocks(sparse.random, sparse.block, sparse.seed, group.first))
    return Sparse(of, tuple(found))
