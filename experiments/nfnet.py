"""Is a picture better read by a small convolutional network than by its patches?

    python -m experiments.sweep experiments/nfnet.py:world
    python -m experiments.sweep experiments/nfnet.py:photographs --config.data.dir=DIR

Question: at equal FLOPs an example, all trained from scratch, does an NFNet before the transformer
retrieve and caption better than patches that see nothing of each other and a transformer as wide as
that allows?

Expected: on photographs the network finds more, for edges and textures need neighbours; on the
world, whose shapes are few and whose steps are many for it, patches are no worse.

The network has three stages to a grid as coarse as the patches are, and a sixth to a fifth of the
FLOPs. All have the recipe's learning rate, which was found with patches; the network's gradients
are clipped unit by unit, as its authors do. Four heads in place of three, for widths in steps of 8
can be matched more closely.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.runs import ROOT
from unified_mm.cli.recipes import load_recipe

COCO = ROOT / "configs" / "coco.py"

# FLOPs of an example (`python -m unified_mm.sizes`): what patches cost at the recipe's width, and
# the next width of the network's transformer fits into.
SIZES: dict[str, dict[str, Any]] = {
    "world": {
        "model.budget": 2.5e8,
        "data.source": "world",
        "data.world.train": 6000,  # as many as there are photographs
        "data.vocabulary_size": 374,  # as many as its captions fill: logits cost no more
        "evaluation.max_images": 400,
    },
    "photographs": {"model.budget": 3.15e8, "train.steps": 150, "evaluation.max_images": 500},
}
COMMON: dict[str, Any] = {
    "model.heads": 4,
    "train.steps": 200,
    "train.batch_size": 64,
    "train.warmup_steps": 50,
    "checkpoint.every": 100,
    "checkpoint.keep": 1,
    "evaluation.also": (),
    "logging.tensorboard": False,
}


def get_config(size: str) -> ConfigDict:
    """Returns the recipe with an NFNet, at size `tiny`."""
    config: ConfigDict = load_recipe(COCO).get_config(size)
    image = config.model.modalities.image
    image.stem = "nfnet"
    image.stem_options = {"channels": (32, 64, 128), "blocks": (1, 2, 3)}
    config.train.adaptive_clip = 0.01
    return config


def get_ablation(size: str) -> Ablation:
    """Returns the ablation on the world or on photographs.

    Raises:
      ValueError: if there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}")
    return Ablation(
        "configs/coco.py:tiny",
        seeds=range(3),
        common=COMMON | SIZES[size],
        variants={"patches": {}, "nfnet": {"config": "experiments/nfnet.py:tiny"}},
        scores=(
            "single_caption/text_to_image/recall_at_1",
            "single_caption/text_to_image/recall_at_10",
            "caption/nats",
            "caption/cider_d",
        ),
    )
