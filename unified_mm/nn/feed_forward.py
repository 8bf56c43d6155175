"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.config import read_options
from unified_mm.nn.attention.attention import AttentionPlan, branch_scale
from unified_mm.nn.layers import Dense, PerModality
from unified_mm.nn.options import TransformerOptions
from unified_mm.registry import resolve

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),  # Hendrycks & Gimpel 2016, the tanh form
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # the same paper's sigmoid form; CLIP
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Mlp(nn.Module):
    """Two dense maps with an activation between (Vaswani et al. 2017, eq. 2): [..., D] -> [..., D].

    With `gated`, the hidden layer is `activation(gate(x)) * up(x)` (Shazeer 2020, equation 6).

    Attributes:
      hidden: F.
      activation: a name of `ACTIVATIONS`.
      output_scale: multiplies the initial standard deviation of the last map.
    """

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    output_scale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def widen(name: str) -> Array:
            return Dense(
                (self.hidden,),
                ("embed",),
                ("feed_forward",),
                use_bias=self.use_bias,
                dtype=self.dtype,
                name=name,
            )(x)

        act = ACTIVATIONS[self.activation]
        hidden = act(widen("gate")) * widen("up") if self.gated else act(widen("up"))
        down = Dense(
            x.shape[-1:],
            ("feed_forward",),
            ("embed",),
            scale=self.output_scale,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="down",
        )
        return down(hidden)


def make_mlp(options: TransformerOptions, *, name: str, use_bias: bool | None = None) -> Mlp:
    """Returns the MLP of a stack; `use_bias`, unless None, overrides the option of the stack."""
    return Mlp(
        options.feed_forward,
        options.activation,
        options.gated_feed_forward,
        options.feed_forward_bias if use_bias is None else use_bias,
        branch_scale(options),
        options.dtype,
        name=name,
    )


class FeedForward(nn.Module):
    """An MLP for all tokens, or one for each modality: [B, N, D] -> [B, N, D]."""

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], plan: AttentionPlan) -> Float[Array, "B N D"]:
        make = partial(make_mlp, self.options)
        return PerModality(make, self.options.separate_feed_forward, name="mlp")(x, plan.groups)


# By name: a module of `options` and of fields of its own, (x [B, N, D], plan) -> [B, N, D].
FEED_FORWARDS = {"dense": "unified_mm.nn.feed_forward:FeedForward"}


def make_feed_forward(options: TransformerOptions, name: str) -> nn.Module:
    """Returns the feed-forward part of a block, which the options name.

    Raises:
      ValueError: it is unknown, or does not have the options given.
    """
    kind = resolve("feed-forward", options.feed_forward_type, FEED_FORWARDS)
    own = dict(options.feed_forward_options)
    own = read_options(kind, own, "model.feed_forward_options")
    made: nn.Module = kind(options=options, **own, name=name)
    return made
