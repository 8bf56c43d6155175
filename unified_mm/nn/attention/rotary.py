"""Rotary positions (Su et al. 2021), and the scalings that stretch them over longer texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unified_mm.config import read_options
from unified_mm.nn.tokens import TokenMetadata

# What counts as one step of the order: seconds, and shares of a picture's height and width.
UNITS = (0.1, 1 / 16, 1 / 16)


@dataclass(frozen=True)
class Linear:
    """Positions that lie `factor` times as close (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def __call__(self, rates: Float[Array, " half"]) -> Float[Array, " half"]:
        return rates / self.factor


@dataclass(frozen=True)
class Llama3:
    """The scaling of Llama 3.1: slow rates are divided, fast ones stay, those between are mixed.

    Attributes:
      factor: by which the slow rates are divided.
      low_freq_factor, high_freq_factor: turns within `original_max_position_embeddings` below
        which a rate is slow, and above which it is fast.
      original_max_position_embeddings: tokens that the model knew before.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, rates: Float[Array, " half"]) -> Float[Array, " half"]:
        turns = self.original_max_position_embeddings * rates / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = jnp.clip(kept, 0.0, 1.0)
        return kept * rates + (1.0 - kept) * rates / self.factor


SCALINGS = {"linear": Linear, "llama3": Llama3}


def scaling_of(options: Mapping[str, Any]) -> Linear | Llama3 | None:
    """Returns the scaling that `model.rotary_options` names by `type`, None where it is empty.

    Raises:
      ValueError: there is none of that name, or it has other fields.
    """
    if not options:
        return None
    where = "model.rotary_options"
    if (kind := options.get("type")) not in SCALINGS:
        raise ValueError(f"{where}.type={kind!r}: must be one of {', '.join(SCALINGS)}")
    fields = {name: value for name, value in options.items() if name != "type"}
    try:
        return SCALINGS[kind](**read_options(SCALINGS[kind], fields, where))
    except TypeError as error:
        raise ValueError(f"{where}: {kind} {str(error).split('() ')[-1]}") from error


def rotary_rates(width: int, base: float, options: Mapping[str, Any]) -> Float[Array, " half"]:
    """Returns the angle by which each pair of a head's numbers is turned from token to token.

    Args:
      width: A, the width of a head.
      base: of the rates, which fall from 1 to nearly 1 / base.
      options: the scaling, as `scaling_of` takes it.
    """
    half = width // 2
    rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = scaling_of(options)
    return rates if scaling is None else scaling(rates)


def rotary_places(metadata: TokenMetadata) -> Float[Array, "B N 3"]:
    """Returns what tokens turn by along time, row and column, in `UNITS`.

    A token without time and coords has its order in place of each (Wang et al. 2024, Qwen2-VL,
    section 2.1).
    """
    order = jnp.repeat(metadata.position.astype(jnp.float32)[..., None], 3, axis=-1)
    if metadata.time is None:
        return order
    row, column = metadata.coords[..., 1], metadata.coords[..., 0]
    places = jnp.stack([metadata.time, row, column], axis=-1) / jnp.array(UNITS)
    placed = np.concatenate([np.full(group.length, group.placed) for group in metadata.groups])
    return jnp.where(placed[None, :, None], places, order)


def rotate(
    x: Float[Array, "B N H A"],
    positions: Int[Array, "B N"] | Float[Array, "B N 3"],
    rates: Float[Array, " half"],
) -> Float[Array, "B N H A"]:
    """Applies rotary positions (Su et al. 2021, equation 34), pairing the two halves of A.

    Of positions along several axes, the pairs take turns.
    """
    half = x.shape[-1] // 2
    if positions.ndim == 3:
        angles = positions[:, :, np.arange(half) % 3][:, :, None] * rates
    else:
        angles = positions[:, :, None, None].astype(jnp.float32) * rates
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
