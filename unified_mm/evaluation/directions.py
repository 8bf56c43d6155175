"""Whether more or less of a score is better: the one table for whatever compares scores."""

from __future__ import annotations

from fnmatch import fnmatchcase

# Patterns of the names of scores; what is written before a name (the split, `single_caption/`, the
# number of shots) changes no direction.
HIGHER = (
    "*recall_at_*",
    "*map_at_*",
    "*accuracy",
    "*accuracy/*",
    "*accuracy_at_*",
    "*mean_per_class",
    "*/map",
    "*/auc",
    "*/d_prime",
    "*cider_d",
    "*bleu_[1-4]",
    "*rouge_l",
    "*_gain",
    "*_gain_low",
    "*_gain_high",
    "*empty_on_*",
)
LOWER = (
    "*loss",
    "*nats",
    "*median_rank",
    "*perplexity",
    "*calibration_error",
    "*ece",
    "*/wer",
    "*/cer",
)


def higher_is_better(score: str) -> bool:
    """Returns whether more of a score is better.

    Raises:
      ValueError: nothing is known of a score of this name; the message has the patterns.
    """
    for patterns, higher in ((HIGHER, True), (LOWER, False)):
        if any(fnmatchcase(score, pattern) for pattern in patterns):
            return higher
    raise ValueError(
        f"whether more or less of {score!r} is better is not known. Known are {', '.join(HIGHER)} "
        f"(more is better) and {', '.join(LOWER)} (less is better)"
    )
