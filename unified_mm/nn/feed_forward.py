"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from unified_mm.nn.attention.attention import AttentionPlan
from unified_mm.nn.layers import Dense, PerModality
from unified_mm.nn.options import TransformerOptions

WHERE = "model.feed_forward_options"  # where a kind of feed-forward has fields of its own
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),  # Hendrycks & Gimpel 2016, the tanh form
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # the same paper's sigmoid form; CLIP
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Mlp(nn.Module):
    """Two dense maps with an activation between (Vaswani et al. 2017, eq. 2): [..., D] -> [..., D].

    With `gated_feed_forward`, the hidden layer is `activation(gate(x)) * up(x)` (Shazeer 2020,
    equation 6).

    Attributes:
      options: of the stack.
      use_bias: unless None, it overrides the option of the stack.
    """

    options: TransformerOptions
    use_bias: bool | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "... D"], limit: Callable[[Array], Array] = lambda hidden: hidden
    ) -> Float[Array, "... D"]:
        """Maps x; of the hidden layer only what `limit` makes of it goes on."""
        o = self.options
        use_bias = o.feed_forward_bias if self.use_bias is None else self.use_bias
        dense = partial(Dense, use_bias=use_bias, dtype=o.dtype)
        widen = partial(dense, (o.feed_forward,), ("embed",), ("feed_forward",))
        act = ACTIVATIONS[o.activation]
        if o.gated_feed_forward:
            hidden = act(widen(name="gate")(x)) * widen(name="up")(x)
        else:
            hidden = act(widen(name="up")(x))
        out = x.shape[-1:], ("feed_forward",), ("embed",)
        return dense(*out, scale=o.branch_scale, name="down")(limit(hidden))


class FeedForward(nn.Module):
    """An MLP for all tokens, or one for each modality: [B, N, D] -> [B, N, D]."""

    options: TransformerOptions

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], plan: AttentionPlan) -> Float[Array, "B N D"]:
        o = self.options
        return PerModality(partial(Mlp, o), o.separate_feed_forward, name="mlp")(x, plan.groups)
