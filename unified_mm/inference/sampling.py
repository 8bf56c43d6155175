"""Drawing the next token of each row: greedily, or by temperature, top-k and top-p."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from unified_mm.inference.decoding import Decoding


@struct.dataclass
class Sampling:
    """How each row is drawn; `Decoding` says what the fields mean.

    Attributes:
      temperature: float32 [B].
      top_k: int32 [B].
      top_p: float32 [B].
      keys: a random key for each row [B], so that its draws do not depend on other rows.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    keys: Any


def make_sampling(
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    draws: UInt32[Array, "B 3"],
) -> Sampling:
    """Returns how rows are drawn.

    Args:
      temperature, top_k, top_p: as in `Decoding`, for each row.
      draws: seed, number of the example and number of its sample.
    """

    def key(draw: UInt32[Array, " 3"]) -> Array:
        seeded = jax.random.fold_in(jax.random.key(draw[0]), draw[1])
        return jax.random.fold_in(seeded, draw[2])

    return Sampling(temperature, top_k, top_p, jax.vmap(key)(draws))


def sampling_arrays(decoding: Decoding, examples: int, first: int = 0) -> dict[str, np.ndarray]:
    """Returns the arguments of `make_sampling`, `decoding.samples` rows for each example.

    Args:
      decoding: how texts are decoded.
      examples: how many there are.
      first: number of the first one, where there were others before.
    """
    rows = examples * decoding.samples
    number, sample = np.divmod(np.arange(rows), decoding.samples)
    draws = np.stack([np.full(rows, decoding.seed), first + number, sample], axis=1)
    return {
        "temperature": np.full(rows, decoding.temperature, np.float32),
        "top_k": np.full(rows, decoding.top_k, np.int32),
        "top_p": np.full(rows, decoding.top_p, np.float32),
        "draws": draws.astype(np.uint32),
    }


def draw(
    logits: Float[Array, "B V"], sampling: Sampling, number: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Draws the next token of each row.

    Args:
      logits: float32.
      sampling: how rows are drawn.
      number: how many tokens each row has drawn before; gives each draw a key of its own.
    """
    likeliest = logits.argmax(-1).astype(jnp.int32)

    def drawn() -> Int[Array, " B"]:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
        ranked = ranked / warm[:, None]
        ranked = jnp.where(allowed(ranked, sampling.top_k, sampling.top_p), ranked, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in)(sampling.keys, number)
        place = jax.vmap(jax.random.categorical)(keys, ranked)
        token = jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, token, likeliest)

    # Sorting a vocabulary costs more than a small model: not where nothing is drawn.
    return jax.lax.cond((sampling.temperature > 0).any(), drawn, lambda: likeliest)


def allowed(
    ranked: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """Returns which tokens may be drawn: the likeliest k, and of these the nucleus of mass p.

    A token belongs to the nucleus where those before it do not yet reach p; so the first one does.

    Args:
      ranked: logits, the likeliest first.
      top_k, top_p: as in `Decoding`, for each row.
    """
    rank = jnp.arange(ranked.shape[-1])
    within = jnp.where(top_k > 0, top_k, ranked.shape[-1])[:, None] > rank
    share = jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    return within & (before < top_p[:, None])
