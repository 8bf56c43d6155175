"""Embeddings and logits become losses and metrics, as sums and counts: one file an objective."""

from unified_mm.objectives.objective import (
    Embedded,
    Objective,
    Outcome,
    Pair,
    TextObjective,
    masked_pair,
    same_rank,
)

__all__ = [
    "Embedded",
    "Objective",
    "Outcome",
    "Pair",
    "TextObjective",
    "masked_pair",
    "same_rank",
]
