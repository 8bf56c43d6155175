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
from experiments.sweeping.presets import at_equal_flops, of_coco


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "both": {},
            "contrastive": {
                "objectives.captioning.weight": 0.0,
                **at_equal_flops(size, "contrastive"),
            },
            "captioning": {
                "objectives.contrastive.weight": 0.0,
                **at_equal_flops(size, "captioning"),
            },
            "all_three": {"objectives.matching.weight": 0.5, **at_equal_flops(size, "matching")},
            "captions_weigh_4": {"objectives.captioning.weight": 4.0},
            "sigmoid": {"objectives.contrastive.loss": "sigmoid"},
        },
        scores=("single_caption/text_to_image/recall_at_1", "caption/cider_d"),
    )
