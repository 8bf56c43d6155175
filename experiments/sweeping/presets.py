"""Config fields that all ablations of one size share, so that their runs can be compared."""

from __future__ import annotations

from typing import Any

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


def common(size: str) -> dict[str, Any]:
    """Returns the fields of a size.

    Raises:
      ValueError: if there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}")
    return dict(SIZES[size])


def at_equal_flops(size: str, cost: float) -> dict[str, int]:
    """Returns the numbers of steps and warm-up steps that cost the FLOPs of the size's own steps.

    Args:
      size: 'tiny' or 'base'.
      cost: FLOPs of a step over those of the recipe's, by `result.json`, or before any run by
        `python -m unified_mm.sizes`, with `data.vocabulary_size` as large as the tokenizer becomes.
    """
    return {name: round(SIZES[size][name] / cost) for name in ("train.steps", "train.warmup_steps")}
