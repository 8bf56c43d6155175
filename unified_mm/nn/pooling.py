"""Pooling: the tokens of an example become one vector."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.attention import into_heads, out_of_heads
from unified_mm.nn.attention.masks import masked_attention
from unified_mm.nn.feed_forward import Mlp
from unified_mm.nn.layers import Norm, partitioned
from unified_mm.nn.options import TransformerOptions
from unified_mm.registry import resolve


def mean(x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    """Returns the mean of the valid tokens; zero where there are none."""
    weights = valid[..., None].astype(jnp.float32)
    return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)


def first(x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    """Returns the first token, such as a class token."""
    return x[:, 0]


def first_two(x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    """Returns the mean of the first two tokens, such as a class and a distillation token (AST)."""
    return x[:, :2].mean(1)


def last(x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    """Returns the last valid token."""
    place = jnp.where(valid, jnp.arange(valid.shape[1]), 0).max(1)
    return jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]


# By name: (x float32 [B, N, D], valid [B, N]) -> [B, D]; 'attention' is the module below.
POOLS: dict[str, Any] = {
    "mean": mean,
    "first": first,
    "first_two": first_two,
    "last": last,
    "attention": "attention",
}


def pool_of(name: str, field: str = "pool") -> Any:
    """Returns a pool by its name, or `package.module:FUNCTION` of one from outside.

    Raises:
      ValueError: there is none of that name; the message names the field.
    """
    return POOLS[name] if name in POOLS else resolve(field, name, POOLS)


def pooled(pool: str, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    """Returns one float32 vector of the valid tokens, by a pool without parameters."""
    vector: Array = pool_of(pool)(x.astype(jnp.float32), valid)
    return vector


class AttentionPool(nn.Module):
    """Attention of a learned query to the tokens, then a feed-forward branch: [B, N, D] -> [B, D].

    Zhai et al. 2022, "Scaling vision transformers", section 3.2 (multi-head attention pooling),
    in the form that SigLIP's weights have.

    Attributes:
      heads: H.
      hidden: F; 0 means 4 D.
      epsilon: of the norm.
    """

    heads: int
    hidden: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
        width = x.shape[-1]
        o = TransformerOptions(width, 1, self.heads, self.hidden or 4 * width)
        start = partitioned(nn.initializers.normal(width**-0.5), None, "embed")
        query = jnp.broadcast_to(
            self.param("query_token", start, (1, width)), (x.shape[0], 1, width)
        )
        x = x.astype(jnp.float32)
        y = masked_attention(
            into_heads(o.heads, o, True, "query")(query),
            into_heads(o.heads, o, True, "key")(x),
            into_heads(o.heads, o, True, "value")(x),
            valid[:, None],
        )
        y = out_of_heads(width, o, True, "output")(y)
        norm = Norm("layer", self.epsilon, name="norm")
        return (y + Mlp(o, name="feed_forward")(norm(y)))[:, 0]
