"""Should modalities share their parameters, and in which part of a layer?

Question: does a transformer of its own parameters for each modality, in attention's projections, in
the feed-forward, or in both, learn more than a shared one, at equal FLOPs?

Expected: separate feed-forwards help most, for they hold most of what a layer knows; FLOPs stay the
same as each token goes through one copy, parameters grow. `both_equal_parameters` is narrower, so
that a gain of parameters alone would not show in it (FLOPs and a head's channels are fewer).
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

ATTENTION = {"model.separate_attention": True}
FEED_FORWARD = {"model.separate_feed_forward": True}
# About as many parameters in two copies as the recipe's width has in one.
NARROW = {
    "tiny": {"model.width": 96, "model.feed_forward": 384},
    "base": {"model.width": 384, "model.feed_forward": 1536},
}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "shared": {},
            "attention": ATTENTION,
            "feed_forward": FEED_FORWARD,
            "both": ATTENTION | FEED_FORWARD,
            "both_equal_parameters": ATTENTION | FEED_FORWARD | NARROW[size],
        },
        scores=(
            "caption/cider_d",
            "single_caption/text_to_image/recall_at_1",
            "foil/accuracy",
        ),
    )
