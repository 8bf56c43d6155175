"""How much of a picture must go on?

Question: what do captions and retrieval lose where the least important patches end after the first
layer (`model.dropping`), those that are most like the picture's mean, or those that a scorer names?

Expected: `keep_20` takes 0.70 of the FLOPs of a whole example's forward pass, the 30% that dynamic
routing between modalities is said to save, at 3% more nats at most and recall within the noise of
`all`. A picture of the world is mostly background, so a fifth of its patches can hold its objects.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

KEEP, BY = "model.dropping.keep", "model.dropping.by"


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "all": {},
            "keep_50": {KEEP: 0.5, BY: "distinct"},
            "keep_35": {KEEP: 0.35, BY: "distinct"},
            "keep_20": {KEEP: 0.2, BY: "distinct"},
            "learned_20": {KEEP: 0.2},
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
