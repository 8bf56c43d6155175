"""Dropped tokens of a context: the most important go on after a layer, the others end there.

Of each group a share goes on, so the sequence is really shorter, and shapes are static. The choice
has no gradient. By `distinct` the tokens farthest from their group's mean go on, by `learned` those
that a scorer names. The scorer learns because what is read of a token is weighed by `1 + score -
stop_gradient(score)`, exactly one: the score's gradient is what a token's contribution to the loss
would change by (Molchanov et al. 2019, equation 8).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unified_mm.nn.layers import Choosing, Norm
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.routing import choose, rounded_up
from unified_mm.nn.tokens import TokenMetadata, spans


class Scorer(nn.Module):
    """A number for each token, by one dense map of its norm: [B, N, D] -> float32 [B, N]."""

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N"]:
        x = Norm(self.options.norm, self.options.norm_epsilon, jnp.float32, name="norm")(
            x.astype(jnp.float32)
        )
        return Choosing((1,), ("embed",), (None,), use_bias=False, name="score")(x)[..., 0]


def distinctness(x: Float[Array, "B N D"], metadata: TokenMetadata) -> Float[Array, "B N"]:
    """Returns how far each token is from the mean of its group's tokens: the mean square."""
    found = []
    for span in spans(metadata.groups).values():
        part, there = x[:, span].astype(jnp.float32), metadata.valid[:, span, None]
        count = jnp.maximum(there.sum(1, keepdims=True, dtype=jnp.float32), 1)
        mean = jnp.where(there, part, 0).sum(1, keepdims=True) / count
        found.append(jnp.square(part - mean).mean(-1))
    return jnp.concatenate(found, axis=1)


def most_important(
    scores: Float[Array, "B N"], metadata: TokenMetadata, keep: float
) -> tuple[Int[Array, "B kept"], TokenMetadata]:
    """Returns which tokens go on, in order, and their metadata.

    Args:
      scores: of each token.
      metadata: of the tokens.
      keep: the share of each group that goes on, rounded up.

    Returns:
      For each that goes on its place among the N tokens, N for an empty slot, which is not valid.
    """
    total = metadata.valid.shape[1]
    slots, groups = [], []
    for group, span in zip(metadata.groups, spans(metadata.groups).values(), strict=True):
        room = kept_of(group.length, keep)
        chosen = jax.vmap(lambda s, v, room=room: choose(s, room, "score", v))(
            scores[:, span, None], metadata.valid[:, span]
        )
        chosen = jnp.sort(chosen[:, 0], axis=1)
        slots.append(jnp.where(chosen < group.length, chosen + span.start, total))
        # Its tokens keep their positions, of which some are now missing.
        short = group._replace(length=room, start=None, grid=(), ordered=False, valid_first=True)
        groups.append(short._replace(places=group.places or group.length))
    found = jnp.concatenate(slots, axis=1)
    kept = jax.tree.map(lambda x: rows_at(x, found, axis=1), metadata)
    return found, kept.replace(groups=tuple(groups))


def kept_of(length: int, keep: float) -> int:
    """Returns how many tokens of a group go on."""
    return max(1, rounded_up(length * keep))


def rows_at(x: Array, slots: Int[Array, "B kept"], axis: int) -> Array:
    """Returns what an array [..., B, ..., N, ...] has in the slots of its tokens, else zeros.

    Args:
      x: of metadata, embeddings, or keys and values.
      slots: of each example.
      axis: of the tokens; the examples lie one before it, or two before where x is of keys.
    """
    examples = axis - 1 if axis == 1 else axis - 2
    shape = [1] * x.ndim
    shape[examples], shape[axis] = slots.shape
    return jnp.take_along_axis(x, slots.reshape(shape), axis=axis, mode="fill", fill_value=0)


def weighed(layers: Any, weight: Float[Array, "B kept"]) -> Any:
    """Returns keys and values, each [..., B, G, kept, A], with the values times a weight."""

    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        key, value = pair
        return key, value * weight[:, None, :, None].astype(value.dtype)

    return jax.tree.map(one, layers, is_leaf=is_pair)


def is_pair(x: Any) -> bool:
    """Returns whether a node of cached layers is the keys and values of a layer."""
    return isinstance(x, tuple) and len(x) == 2 and all(isinstance(each, jax.Array) for each in x)
