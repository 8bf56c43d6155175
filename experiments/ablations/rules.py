"""Who may attend to whom?

Question: what do captions gain where text sees the image, and is matching, which can let both see
each other, worth its FLOPs?

Expected: `blind` is the positive control: a caption that never sees its image can only say what is
usual, so its CIDEr-D falls to that of captions of other images (the chance of the table), and its
image gain to 0. `one_way` is the recipe. `causal` puts image patches in an order too, and learns
less of them; it also has a third fewer steps, for contrast, which has no order, cannot share its
pass over the image. Matching beside it, where text reads the image one way or where both see each
other (captions cannot: a token would see itself through the image), helps retrieval less than it
costs in steps.

All have the FLOPs of `one_way`, by fewer steps where a step costs more.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import at_equal_flops, of_coco

MATCHING = {"objectives.matching.weight": 0.5}
CAPTIONS = "objectives.captioning.rule"


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "one_way": {},
            "blind": {CAPTIONS: "separate_causal"},
            "causal": {CAPTIONS: "causal"} | at_equal_flops(size, "causal"),
            "matching": MATCHING | at_equal_flops(size, "matching"),
            "matching_both_ways": MATCHING
            | {"objectives.matching.rule": "joint"}
            | at_equal_flops(size, "matching_both_ways"),
        },
        scores=(
            "caption/cider_d",
            "caption/image_gain",
            "single_caption/text_to_image/recall_at_1",
        ),
    )
