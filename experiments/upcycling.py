"""Does a dense model that goes on as experts learn more than one that goes on dense?

    python -m experiments.sweep experiments/upcycling.py --name=upcycling --seeds=0 \\
        --config.model.start_from.whole=runs/ablations/experts/dense-0

Question: what does a trained dense run gain in 1,000 steps more, where each feed-forward becomes
four experts for each modality, copies of it to begin with, of which each token uses one?

Expected: below `dense` in nats, for it begins where that begins and has more parameters at the same
active FLOPs (Komatsuzaki et al. 2022, "Sparse upcycling").
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

EXPERTS = {
    "count": 4,
    "by": "modality",
    "order": "priority",
    "group": 16,
    "drop_text": False,
    "gate": "normalised",
}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        common={"train.steps": 1000, "train.warmup_steps": 30},
        variants={
            "dense": {},
            "upcycled": {
                "model.feed_forward_type": "experts",
                "objectives.routing.weight": 1.0,
                "model.feed_forward_options": EXPERTS,
            },
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
