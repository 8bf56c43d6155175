"""Where should the modalities meet on photographs, with eyes that have seen others?

    python -m experiments.sweep experiments/fusion_photographs.py --config.data.dir=DIR

Question: at equal FLOPs an example, behind the same frozen eyes, which of early fusion, gated
cross-attention and two towers finds photographs best, and which of the first two describes best?

Expected: two towers find no worse than early fusion, whose texts and pictures meet in captions
alone; early fusion describes better than gated layers that start closed.

The eyes' features are computed once and kept, so they cost none of the FLOPs. Each fusion is as
wide as the FLOPs of the recipe's early fusion allow. Two towers learn by contrast alone, and
`early_contrast` does so too.
"""

from typing import Any

from experiments.sweeping.ablation import Ablation

# FLOPs of an example of the recipe's early fusion (`python -m unified_mm.sizes`): of tiny's, 1.01e9
# are the eyes', which are counted as if they were trained, in all fusions alike.
COMMON: dict[str, Any] = {
    "checkpoint.every": 100,
    "checkpoint.keep": 1,
    "model.start_from.reader": "",  # texts are read by what is compared
    "model.budget": 1.42e9,
    "model.heads": 4,  # for widths in steps of 8
    "train.steps": 150,
    "train.batch_size": 64,
    "train.warmup_steps": 50,
    "evaluation.also": (),
    "evaluation.max_images": 500,
    "logging.tensorboard": False,
}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at size `tiny`."""
    return Ablation(
        f"configs/photographs.py:{size}",
        seeds=range(3),
        common=COMMON,
        variants={
            "early": {},
            "gated": {"model.fusion": "gated_cross_attention", "model.resampler.latents": 16},
            "late": {"model.fusion": "late"},
            "early_contrast": {"objectives.captioning.weight": 0.0},
        },
        scores=("single_caption/text_to_image/recall_at_10", "caption/nats", "caption/cider_d"),
    )
