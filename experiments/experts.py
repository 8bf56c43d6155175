"""Do several experts for each modality learn more than one, at equal active FLOPs?

Question: what does a mixture of experts (`model.feed_forward_type='experts'`), of which each token
uses one, gain over the dense feed-forward, and over one feed-forward for each modality?

Expected: `by_modality` is below `separate` in nats, and both below `dense`; `by_token`, whose pool
all modalities share, at most 0.02 nats above `dense`, for its captions drop tokens in training.
Where 16 examples share the room of an expert (`..._of_16`) fewer tokens are dropped, for patches of
one picture are alike. Without losses of entropy one modality comes to use few of the experts that
all share (Mustafa et al. 2022, LIMoE); `entropies` has both. Texts are served by place, so that
their ends are dropped, and captions then do not end; `..._all_text` drops of pictures alone.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

EXPERTS = {"model.feed_forward_type": "experts", "objectives.routing.weight": 1.0}
OPTIONS = "model.feed_forward_options"
BY_MODALITY = {"count": 4, "by": "modality", "order": "priority"}
BY_TOKEN = {"count": 8, "order": "priority"}
ALL_TEXT = {"group": 16, "drop_text": False}
ENTROPIES = {"objectives.routing.local_entropy": 0.04, "objectives.routing.global_entropy": 0.04}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "dense": {},
            "separate": {"model.separate_feed_forward": True},
            "by_modality": {**EXPERTS, OPTIONS: BY_MODALITY},
            "by_token": {**EXPERTS, OPTIONS: BY_TOKEN},
            "by_modality_of_16": {**EXPERTS, OPTIONS: {**BY_MODALITY, "group": 16}},
            "by_token_of_16": {**EXPERTS, OPTIONS: {**BY_TOKEN, "group": 16}},
            "entropies": {**EXPERTS, **ENTROPIES, OPTIONS: {**BY_TOKEN, "group": 16}},
            "by_modality_all_text": {**EXPERTS, OPTIONS: {**BY_MODALITY, **ALL_TEXT}},
            "by_token_all_text": {**EXPERTS, OPTIONS: {**BY_TOKEN, **ALL_TEXT}},
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
