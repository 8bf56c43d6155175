"""The Perceiver resampler: any number of features in, a fixed number out.

Jaegle et al. 2021 (Perceiver) introduce latents that attend; this form is that of Alayrac et al.
2022 (Flamingo), section 3.1.1 and appendix A.1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.attention import (
    AttentionPlan,
    attend,
    head_norm,
    into_heads,
    out_of_heads,
    plan_attention,
)
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.feed_forward import Mlp
from unified_mm.nn.layers import Norm, partitioned
from unified_mm.nn.options import GateOptions, TransformerOptions
from unified_mm.nn.tokens import Group, single_document

# Each latent sees all features and all latents.
ALL = MaskTable((View("none", "joint"),))


@dataclass(frozen=True)
class ResamplerOptions:
    """The shape of a resampler.

    Attributes:
      latents: how many features come out; 0 means no resampler.
      frames: how many frames a clip may have, each with a learned embedding; 0 means that none are
        learned.
      blocks: shape of the attention and feed-forward blocks, which have no biases; `width` is that
        of the features.
      head_norm: kind of the norm of each head's queries and keys, where there is one.
    """

    latents: int
    frames: int
    blocks: TransformerOptions
    head_norm: str = "rms"

    @classmethod
    def from_config(
        cls, fields: Mapping[str, Any], width: int, main: TransformerOptions
    ) -> ResamplerOptions:
        """Returns the options of `config.model.resampler`.

        Args:
          fields: of the config.
          width: of the features.
          main: options of the main stack, for the dtype and the attention backend.
        """
        blocks = TransformerOptions(
            width=width,
            layers=fields["layers"],
            heads=fields["heads"],
            head_width=fields["head_width"],
            feed_forward=fields["feed_forward"],
            activation=fields["activation"],
            norm_epsilon=1e-5,
            feed_forward_bias=False,
            dtype=main.dtype,
            attention=main.attention,
            cross=GateOptions(query_key_norm=fields["query_key_norm"]),
        )
        return cls(fields["latents"], fields["frames"], blocks, fields["head_norm"])


class PerceiverResampler(nn.Module):
    """Learned latents that attend to the features and to themselves, layer by layer."""

    options: ResamplerOptions

    @nn.compact
    def __call__(
        self, features: Float[Array, "B S N D"], valid: Bool[Array, "B S N"]
    ) -> Float[Array, "B latents D"]:
        """Returns the latents for the features of S frames of N tokens.

        Raises:
          ValueError: there are more frames than embeddings for them.
        """
        o, b = self.options, self.options.blocks
        rows, frames, _, width = features.shape
        if o.frames:
            if frames > o.frames:
                raise ValueError(
                    f"{frames} frames, but model.resampler.frames={o.frames} have embeddings"
                )
            table = partitioned(nn.initializers.normal(0.02), None, "embed")
            times = self.param("times", table, (o.frames, width))
            features = features + times[:frames, None].astype(features.dtype)
        features = features.reshape(rows, -1, width)
        plan = plan_latents(b, valid.reshape(rows, -1), o.latents)
        start = partitioned(nn.initializers.normal(1.0), None, "embed")
        latents = self.param("latents", start, (o.latents, width)).astype(b.dtype)
        x = jnp.broadcast_to(latents, (rows, *latents.shape))
        for layer in range(b.layers):
            attention = ResamplerAttention(b, o.head_norm, name=f"attention_{layer}")
            x = x + attention(x, features, plan)
            norm = Norm("layer", b.norm_epsilon, b.dtype, name=f"feed_forward_norm_{layer}")
            x = x + Mlp(b, name=f"feed_forward_{layer}")(norm(x))
        return Norm("layer", b.norm_epsilon, b.dtype, name="norm")(x)


def plan_latents(
    options: TransformerOptions, valid: Bool[Array, "B K"], latents: int
) -> AttentionPlan:
    """Returns the plan by which each latent sees all valid features and all latents."""
    seen = jnp.pad(valid, ((0, 0), (0, latents)), constant_values=True)
    features = Group("features", "features", valid.shape[1], 0)
    queries = single_document(seen[:, -latents:], Group("latents", "features", latents))
    after = queries.groups[0]._replace(start=features.length)
    keys = single_document(seen, features)
    keys = keys.replace(groups=(features, after))  # type: ignore[attr-defined]
    return plan_attention(options, ALL, queries, keys)


class ResamplerAttention(nn.Module):
    """Attention of the latents to [features | latents], which have a norm each."""

    options: TransformerOptions
    head_norm: str

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B latents D"],
        features: Float[Array, "B K D"],
        plan: AttentionPlan,
    ) -> Float[Array, "B latents D"]:
        o = self.options
        latents = Norm("layer", o.norm_epsilon, o.dtype, name="latents_norm")(latents)
        features = Norm("layer", o.norm_epsilon, o.dtype, name="features_norm")(features)
        both = jnp.concatenate([features, latents], axis=1)
        query = into_heads(o.heads, o, False, "query")(latents)
        key = into_heads(o.heads, o, False, "key")(both)
        value = into_heads(o.heads, o, False, "value")(both)
        if o.cross.query_key_norm:
            query = head_norm("query_norm", o, self.head_norm)(query)
            key = head_norm("key_norm", o, self.head_norm)(key)
        seen = attend(self, query, key, value, plan)
        return out_of_heads(o.width, o, False, "output")(seen)
