"""What is learned faster with?

Question: AdamW against Muon and schedule-free AdamW, at the recipe's learning rate and at the same
steps; and for AdamW, a cosine against a line, a constant rate and a rate that is constant and falls
at the end.

Expected: Muon learns most in so few steps (its own share of time a step is small at this width);
schedule-free comes near the cosine without knowing the end; a constant rate is worst. The search
section finds a rate: `--trials=12` on the base, or another optimizer by --config.train.optimizer.
"""

from experiments.sweeping.ablation import Ablation, Search, Span
from experiments.sweeping.presets import of_coco


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "adamw": {},
            "muon": {"train.optimizer": "muon"},
            "schedule_free": {"train.optimizer": "schedule_free", "train.schedule": "constant"},
            "adamw_linear": {"train.schedule": "linear"},
            "adamw_constant": {"train.schedule": "constant"},
            "adamw_falling": {"train.schedule": "constant_then_linear"},
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
        search=Search(
            space={
                "train.learning_rate": Span(5e-4, 1e-2, log=True),
                "train.b2": (0.95, 0.98, 0.999),
            },
            score="caption/nats",
        ),
    )
