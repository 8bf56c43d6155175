"""How does the loss fall with size?

Question: four sizes of one shape, trained on as many examples: does what a caption costs (nats a
token, held out) follow a power law of the training's FLOPs, and with which exponent?

Expected: a straight line between the logarithms over these sizes, with an exponent below that of
language models (Kaplan et al. 2020: -0.05) in size, as the world's captions have little to learn.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import common

# Widths, with heads of 32 and a feed-forward of four widths; the last one is the recipe's.
WIDTHS = {"tiny": (32, 64, 96, 128), "base": (128, 256, 384, 512)}


def get_ablation(size: str) -> Ablation:
    """At a size, `tiny` or `base`."""
    return Ablation(
        config=f"configs/coco.py:{size}",
        common=common(size),
        variants={
            f"width_{width}": {
                "model.width": width,
                "model.heads": width // 32,
                "model.feed_forward": 4 * width,
            }
            for width in reversed(WIDTHS[size])
        },
        seeds=range(5),
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
        power_law="caption/nats",
    )
