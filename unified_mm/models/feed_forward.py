"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.modalities.tokens import Group
from unified_mm.models.per_modality import PerModality
from unified_mm.parallel.layers import Dense


class Mlp(nn.Module):
    """Two dense maps, a GELU between (Vaswani et al. 2017, equation 2). [..., D] -> [..., D]."""

    hidden: int
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        up = Dense((self.hidden,), ("embed",), ("feed_forward",), dtype=self.dtype, name="up")
        down = Dense(
            x.shape[-1:],
            ("feed_forward",),
            ("embed",),
            scale=self.output_scale,
            dtype=self.dtype,
            name="down",
        )
        return down(nn.gelu(up(x)))


class FeedForward(nn.Module):
    """An MLP for all tokens, or one for each modality. [B, N, D] -> [B, N, D]."""

    hidden: int
    separate: bool
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], groups: Sequence[Group]
    ) -> Float[Array, "B N D"]:
        def make(**names: Any) -> nn.Module:
            return Mlp(self.hidden, self.output_scale, self.dtype, **names)

        return PerModality(make, self.separate, name="mlp")(x, groups)
