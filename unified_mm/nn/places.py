"""Positions by when and where tokens are, alike for all modalities: sines, or Fourier features."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.nn.layers import Dense
from unified_mm.nn.tokens import Tokens, blank

PLACES = ("", "sines", "fourier")
BANDS = 16  # frequencies of each of time, x, y and z


class PlaceEmbedding(nn.Module):
    """Adds to tokens what their time and coords say; one map serves all modalities.

    Attributes:
      kind: 'sines', of rates that fall from 100 to 1/10 turns a unit, without parameters; or
        'fourier', a learned map of such sines (Jaegle et al. 2021, Perceiver, section 3.2).
      width: D.
      dtype: of the computation.
    """

    kind: str
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> Tokens:
        metadata = tokens.metadata
        places = jnp.concatenate([metadata.time[..., None], metadata.coords], axis=-1)
        if self.kind == "sines":
            if self.width % 8:
                raise ValueError(f"model.places='sines' needs a width of 8 n, not {self.width}")
            # Of unit variance, as learned positions begin.
            x = sines(places, self.width // 8)
        else:
            dense = Dense((self.width,), (None,), ("embed",), dtype=self.dtype, name="map")
            x = dense(sines(places, BANDS).astype(self.dtype))
        x = tokens.embeddings + x.astype(tokens.embeddings.dtype)
        return tokens.replace(embeddings=blank(x, metadata.valid))  # type: ignore[attr-defined]


def sines(places: Float[Array, "B N four"], bands: int) -> Float[Array, "B N features"]:
    """Returns sines and cosines of each number, of rates from 100 to 1/10 turns a unit."""
    rates = 2 * jnp.pi * 100.0 * 1000.0 ** -jnp.linspace(0.0, 1.0, bands)
    angles = (places[..., None] * rates).reshape(*places.shape[:2], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
