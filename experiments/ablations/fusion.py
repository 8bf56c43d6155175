"""Where should the modalities meet?

Question: at equal FLOPs an example, which of early fusion, gated cross-attention and two towers
retrieves best, and which of the first two captions best?

Expected: two towers retrieve no worse than early fusion, for all their FLOPs go into contrast;
early fusion captions better than gated layers that start closed, in training as short as this.

Each is as wide as the FLOPs of the recipe's early fusion allow; what a fusion cannot do has no
score. Parameters are not equal: one transformer does in early fusion what two do in the others.
Two towers learn by contrast alone, and `early_contrast` does so too: it is what they are to be held
against where objectives must be equal. All have the recipe's learning rate, whatever their width.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

# FLOPs of a training example of early fusion in the recipe (`python -m unified_mm.sizes`).
BUDGET = {"tiny": 7.7e8, "base": 4.1e10}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        common={"model.budget": BUDGET[size]},
        variants={
            "early": {},
            "gated": {
                "model.fusion": "gated_cross_attention",
                "model.resampler.latents": 16 if size == "tiny" else 64,
            },
            "late": {"model.fusion": "late"},
            "early_contrast": {"objectives.captioning.weight": 0.0},
        },
        scores=("single_caption/text_to_image/recall_at_1", "caption/cider_d"),
    )
