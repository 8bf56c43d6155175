"""Config fields that all ablations of one size share, so that their runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.sweeping.ablation import Ablation

RECIPE = "experiments/recipe.py"  # which stays as it is
# Two idle CPU cores take a run of `tiny` through these in three minutes.
TINY: dict[str, Any] = {
    "data.source": "world",
    "train.steps": 240,
    "train.warmup_steps": 30,
    "evaluation.max_images": 400,
    "evaluation.also": (),
    "checkpoint.every": 60,
    "checkpoint.keep": 1,
    "logging.tensorboard": False,
}
# One accelerator; the data is given by --config.data.dir=DIR.
BASE: dict[str, Any] = {
    "data.source": "coco",
    "train.steps": 40_000,
    "train.batch_size": 256,
    "train.warmup_steps": 1000,
    "train.learning_rate": 5e-4,
    "model.dtype": "bfloat16",
    "evaluation.also": (),
    "checkpoint.every": 1000,
    "checkpoint.keep": 1,
}
SIZES = {"tiny": TINY, "base": BASE}
# FLOPs of a step over those of the recipe's, which learns contrast and captioning: by
# `result.json`, or before any run by `python -m unified_mm.sizes`, with `data.vocabulary_size` as
# large as the tokenizer becomes.
COST = {
    "tiny": {
        "contrastive": 0.737,
        "captioning": 0.768,
        "causal": 1.505,
        "matching": 1.750,
        "matching_both_ways": 3.320,
    },
    "base": {
        "contrastive": 0.769,
        "captioning": 0.819,
        "causal": 1.588,
        "matching": 1.576,
        "matching_both_ways": 3.375,
    },
}


def of_coco(size: str, *, common: Mapping[str, Any] | None = None, **asked: Any) -> Ablation:
    """Returns an ablation of `RECIPE` at a size, over the seeds that all share.

    Args:
      size: 'tiny' or 'base'.
      common: fields that its variants share beyond those of the size.
      asked: other fields of the `Ablation`.

    Raises:
      ValueError: if there is no such size.
    """
    fields = common_fields(size) | dict(common or {})
    return Ablation(f"{RECIPE}:{size}", seeds=range(5), common=fields, **asked)


def common_fields(size: str) -> dict[str, Any]:
    """Returns the fields of a size.

    Raises:
      ValueError: if there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}")
    return dict(SIZES[size])


def at_equal_flops(size: str, step: str) -> dict[str, int]:
    """Returns the numbers of steps and warm-up steps that cost the FLOPs of the size's own steps.

    Args:
      size: 'tiny' or 'base'.
      step: which of `COST` each of them costs.
    """
    cost = COST[size][step]
    return {name: round(SIZES[size][name] / cost) for name in ("train.steps", "train.warmup_steps")}
