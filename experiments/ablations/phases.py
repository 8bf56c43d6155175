"""All at once, or one thing after another?

Question: at equal FLOPs, is one phase of everything better than text alone, then contrast, then
both together; or than contrast first and then both?

Expected: in training this short the text phase is wasted on what captioning teaches anyway, and one
phase wins; contrast first may help retrieval, not captions.

Steps are chosen so that all have equal FLOPs; each phase has its own warm-up, cosine and moments,
as phases have where a model is handed on from one to the next. Images that text alone does not see
are computed and counted: at its own cost (a third of that) its phase would have three times the
steps.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import RECIPE, common_fields

PHASED = "experiments/phased.py"


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    shared = common_fields(size)
    steps = shared.pop("train.steps")  # of `one`; the recipe of the others has its own
    return Ablation(
        f"{RECIPE}:{size}",
        common=shared,
        variants={
            "one": {"train.steps": steps},
            "three": {"config": f"{PHASED}:{size},three"},
            "two": {"config": f"{PHASED}:{size},two"},
        },
        seeds=range(5),
        scores=("caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
