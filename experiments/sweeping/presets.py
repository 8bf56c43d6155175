"""What all ablations of one size have in common, so that their runs can be laid side by side."""

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
    """The fields of a size.

    Raises:
      ValueError: another size.
    """
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}")
    return dict(SIZES[size])


def at_equal_flops(size: str, cost: float) -> dict[str, int]:
    """Steps of as many FLOPs as the size's own, where a step costs `cost` times the recipe's.

    The warm-up keeps its share of them.

    Args:
      size: 'tiny' or 'base'.
      cost: as the FLOPs of `result.json` have it; before any run `python -m unified_mm.sizes`,
        with as many words in `data.vocabulary_size` as the tokenizer finds.
    """
    return {name: round(SIZES[size][name] / cost) for name in ("train.steps", "train.warmup_steps")}
