"""Contrast: an image and its text lie closer together than with the others of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.objectives.objective import Outcome, TextObjective, masked_pair
from unified_mm.parallel.layers import Dense

MAX_LOG_SCALE = 4.6052  # ln 100: CLIP's bound, without which training can run away.
SOFTMAX_START = 2.6593  # ln(1 / 0.07), CLIP
SIGMOID_START = (2.3026, -10.0)  # ln 10 and the bias, SigLIP
LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Contrastive(TextObjective):
    """InfoNCE both ways (Radford et al. 2021, figure 3) or sigmoid pairs (Zhai et al. 2023, eq. 1).

    Attributes:
      loss: 'softmax' or 'sigmoid'.
      between: the context modality that is held against text.
      width: E, of the shared space.
    """

    loss: str
    between: str
    width: int

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Contrastive:
        if options["loss"] not in LOSSES:
            raise ValueError(
                f"objectives.{name}.loss={options['loss']!r}: must be one of {', '.join(LOSSES)}"
            )
        built = cls(
            name=name,
            weight=float(options["weight"]),
            rule=str(options["rule"]),
            loss=str(options["loss"]),
            between=str(options["between"]),
            width=int(options["width"]),
        )
        rule = built.stream.resolved()
        if rule.context_to_text != "none" or rule.text_to_context != "none":
            raise ValueError(
                f"objectives.{name}.rule={built.rule!r} lets image and text see each other, and "
                "contrast would be trivial; use 'separate'"
            )
        return built

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return (self.between,)

    def head(self) -> nn.Module | None:
        return ContrastiveHead((self.between, "text"), self.width, self.loss == "sigmoid")

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        earlier: Mapping[str, Outcome],
        *,
        deterministic: bool,
    ) -> Outcome:
        head = model.head[self.name]
        pass_ = encoded[self.name]
        seen = context_valid(pass_, self.between)
        context = head(self.between, pass_.context[self.between], seen)
        text = head("text", pass_.text, text_valid(batch))
        scale, bias = head.scale_and_bias()
        logits = scale * jnp.einsum("BE,CE->BC", context, text) + bias
        paired = paired_rows(batch, self.between)
        loss = sigmoid_loss if self.loss == "sigmoid" else softmax_loss
        losses = loss(logits, paired)
        right = jnp.where(paired[None, :], logits, -jnp.inf).argmax(1) == jnp.arange(len(paired))
        one = jnp.ones((), jnp.float32)
        return Outcome(
            loss=masked_pair(losses, paired),
            metrics={
                "accuracy": masked_pair(right.astype(jnp.float32), paired),
                "scale": (scale, one),
            },
            extras={"similarity": logits, "paired": paired},
        )


class ContrastiveHead(nn.Module):
    """Mean over valid tokens, one dense map a modality, unit length; temperature and bias.

    Attributes:
      between: the modalities that are embedded.
      width: E.
      sigmoid: whether there is a bias, and which temperature training starts from.
    """

    between: tuple[str, ...]
    width: int
    sigmoid: bool

    def setup(self) -> None:
        self.project = {
            name: Dense((self.width,), ("embed",), (None,), use_bias=False)
            for name in self.between
        }
        start = SIGMOID_START[0] if self.sigmoid else SOFTMAX_START
        self.log_scale = self.param("log_scale", nn.initializers.constant(start), ())
        if self.sigmoid:
            self.bias = self.param("bias", nn.initializers.constant(SIGMOID_START[1]), ())

    def __call__(
        self, name: str, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]
    ) -> Float[Array, "B E"]:
        """Tokens of modality `name`, pooled and projected: float32 of unit norm."""
        weights = valid[..., None].astype(jnp.float32)
        total = (x.astype(jnp.float32) * weights).sum(1)
        y = self.project[name](total / jnp.maximum(weights.sum(1), 1.0))
        # The small term keeps the gradient finite for an example that has nothing valid.
        return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-12)

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """exp(t) and b of the logits; without the sigmoid loss b is 0."""
        scale = jnp.exp(jnp.minimum(self.log_scale, MAX_LOG_SCALE))
        return scale, self.bias if self.sigmoid else jnp.zeros(())


def text_valid(batch: Batch) -> Bool[Array, "B T"]:
    """Text tokens that are there."""
    return batch["text"]["valid"] & batch["text"]["present"][:, None]


def context_valid(encoded: Encoded, name: str) -> Bool[Array, "B N"]:
    """Tokens of one context modality that are there."""
    start = 0
    for group in encoded.cache.metadata.groups:
        if group.name == name:
            return encoded.cache.metadata.valid[:, start : start + group.length]
        start += group.length
    raise ValueError(f"the pass holds no modality {name!r}")


def paired_rows(batch: Batch, between: str) -> Bool[Array, " B"]:
    """Examples that have both, with a text that describes (not one that answers a prompt)."""
    text = batch["text"]
    return batch[between]["present"] & text["present"] & ~text["prompted"]


def softmax_loss(logits: Float[Array, "B B"], paired: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Cross-entropy of the right partner among all that are paired, the mean of both ways."""
    masked = jnp.where(paired[None, :] & paired[:, None], logits, -1e9)
    diagonal = jnp.diagonal(masked)
    to_text = jax.nn.logsumexp(masked, axis=1) - diagonal
    to_image = jax.nn.logsumexp(masked, axis=0) - diagonal
    return 0.5 * (to_text + to_image)


def sigmoid_loss(logits: Float[Array, "B B"], paired: Bool[Array, " B"]) -> Float[Array, " B"]:
    """-log sigmoid(z x) summed over a row's pairs, z being +1 on the diagonal and -1 elsewhere."""
    sign = 2.0 * jnp.eye(logits.shape[0]) - 1.0
    both = paired[None, :] & paired[:, None]
    return jnp.where(both, -jax.nn.log_sigmoid(sign * logits), 0.0).sum(1)
