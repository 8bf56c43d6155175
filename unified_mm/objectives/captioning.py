"""Captioning: predicting each text token from the context and the tokens before it.

Answering is the same with the question as a prompt, which is read and not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unified_mm.config import option
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.objectives.objective import (
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
    text_valid,
)


@dataclass(frozen=True)
class Captioning(TextObjective):
    """Autoregressive cross-entropy in nats per token (Wang et al. 2022, SimVLM, equation 3).

    Attributes:
      chunk: tokens of each text that are scored at a time, so that the logits [B, T, V] are never
        in memory at once; 0 scores all.
    """

    weight: float = 1.0
    rule: str = "prefix"
    chunk: int = option(0, least=0)

    kind: ClassVar[str] = "captioning"
    autoregressive: ClassVar[bool] = True

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        chunk = 0 if model.options.counted else self.chunk  # which computes twice
        log_likelihood, right, scored = score_text(
            model.logits, encoded[self.name].text, batch["text"], chunk
        )
        return ObjectiveOutput(
            loss=masked_metric(-log_likelihood, scored),
            metrics={"accuracy": masked_metric(right.astype(jnp.float32), scored)},
            extras={},
        )


def score_text(
    logits: Callable[[Array], Array],
    x: Float[Array, "B T D"],
    text: Mapping[str, Array],
    chunk: int = 0,
) -> tuple[Float[Array, "B T-1"], Bool[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """Scores each token but the first by the embedding of the token before it.

    Args:
      logits: the model's logits of next tokens: [B, N, D] -> [B, N, V].
      x: contextual embeddings of the text.
      text: `ids`, `valid`, `scored` [B, T], `present` [B].
      chunk: tokens at a time; their logits are recomputed for the gradient. 0 takes all.

    Returns:
      The log-likelihood of each target in nats, whether it is the likeliest token, and whether it
      is scored.
    """
    targets = text["ids"][:, 1:]
    scored = (text_valid(text) & text["scored"])[:, 1:]
    count = targets.shape[1]
    x = x[:, :-1]
    if not chunk or chunk >= count:
        likelihood, right = next_token_scores(logits(x), targets)
        return likelihood, right, scored
    parts = -(-count // chunk)
    spare = parts * chunk - count

    def split(values: Array) -> Array:
        """Splits [B, targets, ...] into [parts, B, chunk, ...], with zeros at the end."""
        after = [(0, 0), (0, spare), *[(0, 0)] * (values.ndim - 2)]
        padded = jnp.pad(values, after)
        return padded.reshape(padded.shape[0], parts, chunk, *values.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> tuple[Array, Array]:
        return next_token_scores(logits(part[0]), part[1])

    found = jax.lax.map(one, (split(x), split(targets)))
    likelihood, right = (
        values.swapaxes(0, 1).reshape(targets.shape[0], -1)[:, :count] for values in found
    )
    return likelihood, right, scored


@same_rank
def next_token_scores(
    logits: Float[Array, "B targets V"], targets: Int[Array, "B targets"]
) -> tuple[Float[Array, "B targets"], Bool[Array, "B targets"]]:
    """Returns the log-likelihood of each target in nats, and whether it is the likeliest token."""
    true_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return true_logit - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets
