"""Losses at the exits of the main transformer, so that a text can be told after fewer layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from unified_mm.config import option
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.transformer import EXIT
from unified_mm.objectives.auxiliary import Auxiliary
from unified_mm.objectives.captioning import score_text
from unified_mm.objectives.objective import ObjectiveOutput, StepContext, masked_metric


@dataclass(frozen=True)
class Exits(Auxiliary):
    """The loss of captioning by the state after each of `model.exits`, with shared norm and head.

    Later exits weigh more, in proportion to their layer (Schuster et al. 2022, CALM, section 3.1);
    the loss after all layers is that of captioning itself.

    Attributes:
      weight: of the weighted mean over exits in the total.
      of: the captioning objective.
      chunk: as there.
    """

    of: str = "captioning"
    chunk: int = option(0, least=0)

    def needs(self) -> tuple[str, ...]:
        return (self.of,)

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        exits = model.options.exits
        if model.is_initializing():
            return ObjectiveOutput((jnp.zeros(()), jnp.zeros(())), {}, {})
        sown = f"{EXIT}:{context.read_as[self.of]}"
        (states,) = (x for path, x in context.auxiliary.items() if path.endswith(f"/{sown}"))
        chunk = 0 if model.options.counted else self.chunk  # which computes twice
        total, metrics = jnp.zeros(()), {}
        for layer in exits:
            x = model.transformer.normed(states[layer // model.options.blocks_per_period - 1])
            likelihood, right, scored = score_text(model.logits, x, batch["text"], chunk)
            loss = masked_metric(-likelihood, scored)
            total = total + layer / sum(exits) * loss[0]
            metrics[f"loss_{layer}"] = loss
            metrics[f"accuracy_{layer}"] = masked_metric(right.astype(jnp.float32), scored)
        return ObjectiveOutput((total, loss[1]), metrics, {})
