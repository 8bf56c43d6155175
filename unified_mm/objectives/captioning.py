"""Captioning: predict each text token from the context and the tokens before it.

Answering is the same thing with the question as a prompt, which is read and not scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.objectives.objective import Outcome, TextObjective, masked_pair


@dataclass(frozen=True)
class Captioning(TextObjective):
    """Autoregressive cross-entropy in nats a token (Wang et al. 2022, SimVLM, equation 3)."""

    kind: ClassVar[str] = "captioning"
    autoregressive: ClassVar[bool] = True

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Captioning:
        return cls(name, float(options["weight"]), str(options["rule"]))

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        earlier: Mapping[str, Outcome],
        *,
        deterministic: bool,
    ) -> Outcome:
        logits = model.logits(encoded[self.name].text[:, :-1])
        log_likelihood, right, scored = next_token_scores(logits, batch["text"])
        return Outcome(
            loss=masked_pair(-log_likelihood, scored),
            metrics={"accuracy": masked_pair(right.astype(jnp.float32), scored)},
            extras={},
        )


def next_token_scores(
    logits: Float[Array, "B P V"], text: Mapping[str, Array]
) -> tuple[Float[Array, "B P"], Bool[Array, "B P"], Bool[Array, "B P"]]:
    """What the logits at each token but the last say of the next one; P = T - 1.

    Returns:
      The log-likelihood of the true next token in nats, whether it is the likeliest one, and
      whether it is scored.
    """
    targets = text["ids"][:, 1:]
    scored = (text["valid"] & text["scored"])[:, 1:] & text["present"][:, None]
    true_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_likelihood = true_logit - jax.nn.logsumexp(logits, axis=-1)
    return log_likelihood, logits.argmax(-1) == targets, scored
