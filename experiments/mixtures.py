"""By which shares should three sources of unequal size and quality be mixed?

    mkdir -p runs/mixtures
    ln -s FLICKR8K runs/mixtures/photographs
    ln -s TUXPAINT runs/mixtures/stamps
    python -m experiments.sweep experiments/mixtures.py

Question: of 6,000 scenes of the world, 6,000 photographs and 472 drawn stamps, trained on
together by size, by its square root, alike, or by shares given by hand, how does each source fare?

Expected: each source does better the larger its share, but for the stamps, which are seen again and
again where all have alike.

One seed: it says what each kind of shares does, and tells no small differences.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.sweeping.ablation import Ablation
from experiments.sweeping.runs import ROOT
from unified_mm.cli.recipes import load_recipe

COCO = ROOT / "configs" / "coco.py"

SOURCES: dict[str, dict[str, Any]] = {
    "world": {"source": "world", "share": 0.0},
    "photographs": {"dir": "runs/mixtures/photographs", "share": 0.0},
    "stamps": {"dir": "runs/mixtures/stamps", "share": 0.0},
}
GIVEN = {"world": 0.25, "photographs": 0.65, "stamps": 0.1}  # mostly what is hardest to learn


def get_config(size: str) -> ConfigDict:
    """Returns the recipe on the three sources, at size `tiny`."""
    config: ConfigDict = load_recipe(COCO).get_config(size)
    config.data.source = "mixture"
    config.data.mixture = SOURCES
    config.data.world.train = 6000
    # `val` of all would begin with the world's, and be scored no further than it.
    config.evaluation.split = "val_world"
    config.evaluation.also = ("val_photographs", "val_stamps")
    return config


def get_ablation(size: str) -> Ablation:
    """Returns the ablation at size `tiny`."""
    return Ablation(
        f"experiments/mixtures.py:{size}",
        seeds=(0,),
        common={
            "train.steps": 150,
            "train.batch_size": 64,
            "train.warmup_steps": 50,
            "checkpoint.every": 100,
            "checkpoint.keep": 1,
            "evaluation.max_images": 400,
            "logging.tensorboard": False,
        },
        variants={
            "by_size": {},
            "by_root": {"data.mixture_alpha": 0.5},
            "alike": {"data.mixture_alpha": 0.0},
            "given": {f"data.mixture.{name}.share": share for name, share in GIVEN.items()},
        },
        scores=(
            "single_caption/text_to_image/recall_at_10",
            "caption/nats",
            "val_photographs/single_caption/text_to_image/recall_at_10",
            "val_photographs/caption/nats",
            "val_stamps/single_caption/text_to_image/recall_at_10",
            "val_stamps/caption/nats",
        ),
    )
