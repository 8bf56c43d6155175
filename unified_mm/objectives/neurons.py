"""The loss of the predictors that name which neurons a picture uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.neurons import NEURONS
from unified_mm.objectives.auxiliary import Auxiliary
from unified_mm.objectives.objective import ObjectiveOutput, StepContext


@dataclass(frozen=True)
class Neurons(Auxiliary):
    """The cross-entropy of each neuron's being used, as each layer's predictor names them.

    Only the predictors learn by it. `found` is the share of the neurons used that a predictor
    names among as many.

    Attributes:
      weight: of the mean over layers, pictures and neurons in the total.
    """

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        left = [x for path, x in context.auxiliary.items() if path.endswith(f"/{NEURONS}")]
        # Towers whose features were computed before do not run.
        if model.is_initializing() or not left:
            return ObjectiveOutput((jnp.zeros(()), jnp.zeros(())), {}, {})
        loss, found, seen = sum(x.reshape(-1, 3).sum(0) for x in left)
        return ObjectiveOutput((loss, seen), {"found": (found, seen)}, {})
