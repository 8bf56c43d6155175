"""Does a patch need to know its row and its column?

Question: positions of image patches that start as sines of row and column (`grid`, 2D), as sines of
their place in reading order alone (`line`, 1D), as noise of the same size (`random`), or none at
all.

Expected: all but `none` are learned, so any can tell rows from columns in the end; 2D at the start
teaches neighbourhood for nothing and learns sooner than 1D, and this sooner than noise, above all
which object is on which side (`foil/accuracy/side`); without positions no side can be told at all.
Always saying the commoner side is right 0.57 times here: what is not above that is not learned.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

FIELD = "model.modalities.image.positions"


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "grid": {},
            "line": {FIELD: "line"},
            "random": {FIELD: "random"},
            "none": {FIELD: "none"},
        },
        scores=(
            "caption/cider_d",
            "single_caption/text_to_image/recall_at_1",
            "foil/accuracy/side" if size == "tiny" else "caption/image_gain",
        ),
    )
