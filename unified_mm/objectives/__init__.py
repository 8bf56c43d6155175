"""Objectives, which turn embeddings and logits into losses and metrics, as sums and counts."""

from unified_mm.objectives.objective import (
    Embedded,
    Metric,
    Objective,
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
)
from unified_mm.objectives.pair_losses import PairLoss

__all__ = [
    "Embedded",
    "Objective",
    "ObjectiveOutput",
    "StepContext",
    "Metric",
    "PairLoss",
    "TextObjective",
    "masked_metric",
    "same_rank",
]
