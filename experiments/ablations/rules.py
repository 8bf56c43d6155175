"""Who may attend to whom?

Question: what do captions and matching gain where text sees the image, and where both see each
other?

Expected: `blind` is the positive control: a caption that never sees its image can only say what is
usual, so its CIDEr-D falls to that of captions of other images (chance in the table), and its image
gain to 0. `one_way` is the recipe. `causal` gives image patches an order and takes half of what
they see. `both_ways` lets matching's text and image see each other (captions cannot: a token would
see itself through the image); that costs a second pass over the image and may help foils little.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import common

MATCHING = {"objectives.matching.weight": 0.5}


def get_ablation(size: str) -> Ablation:
    """At a size, `tiny` or `base`."""
    return Ablation(
        config=f"configs/coco.py:{size}",
        common=common(size, tiny={"train.steps": 260}) | MATCHING,
        variants={
            "one_way": {},
            "blind": {"objectives.captioning.rule": "separate_causal"},
            "causal": {"objectives.captioning.rule": "causal"},
            "both_ways": {"objectives.matching.rule": "joint"},
        },
        seeds=range(5),
        scores=("caption/cider_d", "caption/image_gain", "foil/accuracy"),
    )
