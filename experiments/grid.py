"""Does a patch need to see patches that are far away?

Question: what do captions and retrieval lose where each of 256 patches sees, of its picture, the
5 x 5 around it (`model.sparse`), in all layers, while text sees all?

Expected: within the noise of `all`: the words gather what stands far apart.
"""

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.presets import of_coco


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at a size, `tiny` (on pictures of 64 pixels) or `base` (of 224)."""
    return of_coco(
        size,
        common={"model.modalities.image.patch": 4 if size == "tiny" else 14},
        variants={"all": {}, "grid": {"model.sparse": {"image": {"grid": 2}}}},
        scores=("caption/nats", "caption/cider_d", "single_caption/text_to_image/recall_at_1"),
    )
