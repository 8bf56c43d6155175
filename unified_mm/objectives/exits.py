"""Losses at the exits of the main transformer, so that a text can be told after fewer layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from unified_mm.config import check_options, option, read_options
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import View
from unified_mm.nn.transformer import EXIT
from unified_mm.objectives.captioning import score_text
from unified_mm.objectives.objective import ObjectiveOutput, StepContext, masked_metric


@dataclass(frozen=True)
class Exits:
    """The loss of captioning by the state after each of `model.exits`, with shared norm and head.

    Later exits weigh more, in proportion to their layer (Schuster et al. 2022, CALM, section 3.1);
    the loss after all layers is that of captioning itself.

    Attributes:
      name: its key under `config.objectives`.
      weight: of the weighted mean over exits in the total.
      of: the captioning objective.
      chunk: as there.
    """

    name: str
    weight: float = option(0.0, least=0)
    of: str = "captioning"
    chunk: int = option(0, least=0)

    kind: ClassVar[str] = ""
    auxiliary: ClassVar[bool] = True

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Exits:
        """Returns the objective of `config.objectives.<name>`: its fields are its options.

        Raises:
          ValueError: an option is none of its fields, or its value is not allowed.
        """
        own = {key: options[key] for key in options if key not in ("type", "weight_schedule")}
        built = cls(name=name, **read_options(cls, own, f"objectives.{name}"))
        check_options(built, f"objectives.{name}")
        return built

    def needs(self) -> tuple[str, ...]:
        return (self.of,)

    def views(self) -> tuple[View, ...]:
        return ()

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return ()

    def head(self) -> nn.Module | None:
        return None

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
        sown = f"{EXIT}:{self.of}"
        (states,) = (x for path, x in context.auxiliary.items() if path.endswith(f"/{sown}"))
        total, metrics = jnp.zeros(()), {}
        for layer in exits:
            x = model.transformer.normed(states[layer // model.options.blocks_per_period - 1])
            likelihood, right, scored = score_text(model.logits, x, batch["text"], self.chunk)
            loss = masked_metric(-likelihood, scored)
            total = total + layer / sum(exits) * loss[0]
            metrics[f"loss_{layer}"] = loss
            metrics[f"accuracy_{layer}"] = masked_metric(right.astype(jnp.float32), scored)
        return ObjectiveOutput((total, loss[1]), metrics, {})
