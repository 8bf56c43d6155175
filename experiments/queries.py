"""Do a few learned queries see as much of a picture as all its patches?

Question: what do captions lose where a language model looks at a picture through 16 or 8 learned
queries (the Perceiver resampler, `model.resampler.latents`), beside one that looks at all 64
patches, and beside one sequence of patches and words?

Expected: within the noise of `all_features`. What queries save is what looks at them: here the
cross layers alone, for the tower reads all patches either way, so that FLOPs fall far less than to
the third that is published, where a large language model had read every patch.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco

GATED = {"model.fusion": "gated_cross_attention"}
LATENTS = "model.resampler.latents"


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` or `base`."""
    return of_coco(
        size,
        variants={
            "all_features": {**GATED, LATENTS: 0},
            "queries_16": {**GATED, LATENTS: 16},
            "queries_8": {**GATED, LATENTS: 8},
            "one_sequence": {},
        },
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
