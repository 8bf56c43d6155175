"""Do objectives help each other?

Question: at equal FLOPs, does retrieval gain by captioning beside it, or captions by contrast; does
matching add to both; and is the pairwise sigmoid loss better than softmax at these batches, each
with the scale that its paper starts from?

Expected: each objective alone scores higher in its own, for all steps are its; contrast beside
captions costs them little; matching is not worth its FLOPs in training this short; sigmoid is no
worse than softmax (Zhai et al. 2023 find it better at small batches).

`captions_weigh_4` tells few steps from interference: it has the steps of `both`, and its captions
a louder voice in the gradient, whose norm is clipped.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import at_equal_flops, common

# FLOPs of a step over those of contrast and captioning together.
COST = {
    "tiny": {"contrastive": 0.737, "captioning": 0.768, "all_three": 1.750},
    "base": {"contrastive": 0.769, "captioning": 0.819, "all_three": 1.576},
}
CHANGES = {
    "contrastive": {"objectives.captioning.weight": 0.0},
    "captioning": {"objectives.contrastive.weight": 0.0},
    "all_three": {"objectives.matching.weight": 0.5},
}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    dearer = {
        name: changes | at_equal_flops(size, COST[size][name]) for name, changes in CHANGES.items()
    }
    return Ablation(
        config=f"configs/coco.py:{size}",
        common=common(size),
        variants={
            "both": {},
            **dearer,
            "captions_weigh_4": {"objectives.captioning.weight": 4.0},
            "sigmoid": {"objectives.contrastive.loss": "sigmoid"},
        },
        seeds=range(5),
        scores=("single_caption/text_to_image/recall_at_1", "caption/cider_d"),
    )
