"""Shared parameters, or a copy of them for each modality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.modalities.tokens import Group


class PerModality(nn.Module):
    """One module for all tokens, or a copy of it for each modality.

    Attributes:
      make: builds the module, given its name: `make(name="shared")` or `make(name="image")`.
      separate: whether each modality has parameters of its own.
    """

    make: Callable[..., nn.Module]
    separate: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N ..."], groups: Sequence[Group]
    ) -> Float[Array, "B N ..."]:
        """Tokens [B, N, ...] lie by `groups`, so each modality's share is a static slice."""
        if not self.separate:
            return self.make(name="shared")(x)
        modules: dict[str, nn.Module] = {}
        parts, start = [], 0
        for modality, length in merge_runs(groups):
            if modality not in modules:
                modules[modality] = self.make(name=modality)
            parts.append(modules[modality](x[:, start : start + length]))
            start += length
        return jnp.concatenate(parts, axis=1)


def merge_runs(groups: Sequence[Group]) -> list[tuple[str, int]]:
    """(modality, length) of each run of neighbouring groups of one modality."""
    runs: list[tuple[str, int]] = []
    for group in groups:
        if runs and runs[-1][0] == group.modality:
            runs[-1] = (group.modality, runs[-1][1] + group.length)
        else:
            runs.append((group.modality, group.length))
    return runs
