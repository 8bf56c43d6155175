"""Do several experts for each modality learn more than one, at equal active FLOPs?

Question: what does a mixture of experts (`model.feed_forward_type='experts'`), of which each token
uses one, gain over the dense feed-forward, and over one feed-forward for each modality?

Expected: `by_modality` is below `separate` in nats, and both below `dense`; `by_token`, whose pool
all modalities share, at most 0.02 nats above `dense`, for its captions drop tokens in training.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

EXPERTS = {"model.feed_forward_type": "experts", "objectives.routing.weight": 1.0}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "dense": {},
            "separate": {"model.separate_feed_forward": True},
            "by_modality": EXPERTS
            | {"model.feed_forward_options": {"count": 4, "by": "modality", "order": "priority"}},
            "by_token": EXPERTS | {"model.feed_forward_options": {"count": 8, "order": "priority"}},
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
