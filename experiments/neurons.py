"""Do a fifth of the neurons suffice for a picture?

Question: what do captions lose where a picture uses, of each feed-forward's neurons, the fifth that
is most active over its patches, and at inference the fifth that a predictor names
(`model.feed_forward_type='neurons'`)?

Expected: `few` is within 0.005 nats of `relu`, which has all neurons and the same activation; what
an activation with zeros costs is the gap from `relu` to `gelu`.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

RELU = {"model.activation": "relu"}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "gelu": {},
            "relu": RELU,
            "few": {
                **RELU,
                "model.feed_forward_type": "neurons",
                "model.feed_forward_options": {"share": 0.2},
                "objectives.neurons.weight": 1.0,
            },
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
