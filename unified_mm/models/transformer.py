"""The transformer block and the scanned stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.models.attention import Attention, AttentionPlan, KeysValues
from unified_mm.models.feed_forward import FeedForward
from unified_mm.parallel.layers import LayerNorm


@dataclass(frozen=True)
class TransformerOptions:
    """Shape of the stack.

    Attributes:
      width, layers, heads, feed_forward: D, L, H and F.
      dropout: share of each residual branch's outputs that training drops.
      separate_attention, separate_feed_forward: parameters of its own for each modality.
      rematerialise: recompute a block's activations in the backward pass instead of keeping them.
      unroll: how many layers a step of the scan holds; the parameter tree is the same.
      dtype: of the computation; parameters are float32.
    """

    width: int
    layers: int
    heads: int
    feed_forward: int
    dropout: float = 0.0
    separate_attention: bool = False
    separate_feed_forward: bool = False
    rematerialise: bool = False
    unroll: int = 1
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"model.width={self.width} is no multiple of heads={self.heads}")


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream (Xiong et al. 2020)."""

    options: TransformerOptions
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], plan: AttentionPlan, cached: KeysValues | None
    ) -> tuple[Float[Array, "B N D"], KeysValues]:
        o = self.options
        # Each of the 2 L branches adds to the stream: start them small (GPT-2, section 2.3).
        scale = (2 * o.layers) ** -0.5
        dropout = nn.Dropout(o.dropout, deterministic=self.deterministic)
        attention = Attention(o.heads, o.separate_attention, scale, o.dtype, name="attention")
        feed_forward = FeedForward(
            o.feed_forward, o.separate_feed_forward, scale, o.dtype, name="feed_forward"
        )
        y, kept = attention(LayerNorm(dtype=o.dtype, name="attention_norm")(x), plan, cached)
        x = x + dropout(y)
        y = feed_forward(LayerNorm(dtype=o.dtype, name="feed_forward_norm")(x), plan.groups)
        x = nn.with_logical_constraint(x + dropout(y), ("batch", "length", "activation"))
        return x, kept


class Transformer(nn.Module):
    """Blocks whose parameters are stacked [L, ...] and run under a scan, then a norm."""

    options: TransformerOptions

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        plan: AttentionPlan,
        cached: KeysValues | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B N D"], KeysValues]:
        """Contextual embeddings [B, N, D], and keys and values [L, B, K, H, A].

        `cached` holds those of earlier tokens; what comes back then has the new ones written in.
        Without it, the keys and values that `plan.keep` asks for come back.
        """
        o = self.options
        block = nn.remat(Block, prevent_cse=False) if o.rematerialise else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=o.layers,
            unroll=o.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, kept = layers(o, deterministic, name="layers")(x, plan, cached)
        return LayerNorm(dtype=o.dtype, name="norm")(x), kept
