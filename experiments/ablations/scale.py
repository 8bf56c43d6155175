"""How does the loss fall with size?

Question: four sizes of one shape, trained on as many examples: does what a caption costs (nats a
token, held out) follow a power law of the training's FLOPs, and with which exponent?

Expected: loss falls with size, and over so short a range by a law whose floor and exponent can
hardly be told apart. All widths have the recipe's learning rate, which suits its own width best.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

# Widths, with a feed-forward of four of them; the last one is the recipe's, as is a head's.
WIDTHS = {"tiny": (32, 64, 96, 128), "base": (128, 256, 384, 512)}
HEAD = {"tiny": 32, "base": 64}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            f"width_{width}": {
                "model.width": width,
                "model.heads": width // HEAD[size],
                "model.feed_forward": 4 * width,
            }
            for width in reversed(WIDTHS[size])
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
        power_law="caption/nats",
    )
