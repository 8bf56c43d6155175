"""Do objectives help each other?

Question: does retrieval gain by captioning beside it, and by matching too; and is the pairwise
sigmoid loss better than softmax at these batches?

Expected: captioning costs retrieval little or helps it, as it makes the image encoder tell what
contrast can do without; matching helps foils; sigmoid is no worse than softmax (Zhai et al. 2023
find it better at small batches). FLOPs are not equal: every objective adds its own.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import common


def get_ablation(size: str) -> Ablation:
    """At a size, `tiny` or `base`."""
    return Ablation(
        config=f"configs/coco.py:{size}",
        common=common(size, tiny={"train.steps": 260}),
        variants={
            "contrastive_captioning": {},
            "contrastive": {"objectives.captioning.weight": 0.0},
            "captioning": {"objectives.contrastive.weight": 0.0},
            "all_three": {"objectives.matching.weight": 0.5},
            "sigmoid": {"objectives.contrastive.loss": "sigmoid"},
        },
        seeds=range(5),
        scores=(
            "single_caption/text_to_image/recall_at_10",
            "caption/cider_d",
            "foil/accuracy",
        ),
    )
