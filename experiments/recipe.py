"""The recipe that the ablations and the kept results were trained with, as it was.

    python -m unified_mm.main --config=experiments/recipe.py:tiny --workdir=runs/again

It began as `configs/coco.py` and says itself all that this one set then. Recipes in `configs/`
become better; what is compared over the seeds of months stays comparable.
"""

from ml_collections import ConfigDict

from unified_mm.default_config import default_config


def get_config(size: str) -> ConfigDict:
    """Returns the config at a size, 'tiny' or 'base'."""
    if size not in ("tiny", "base"):
        raise ValueError(f"no size {size!r}; there are tiny, base")
    config = default_config()
    config.size = size
    if size == "tiny":
        tiny(config)
    else:
        base(config)
    return config


def tiny(config: ConfigDict) -> None:
    """Sets what two CPU cores train in minutes."""
    config.data.crop_scale = (0.85, 1.0)
    config.data.crop_ratio = (0.95, 1.05)
    config.data.vocabulary_size = 4096
    config.model.modalities.image.stem = "hierarchical"
    config.model.modalities.text.length = 32
    config.model.unroll = 4
    config.train.steps = 1000
    config.train.batch_size = 64
    config.train.learning_rate = 2e-3


def base(config: ConfigDict) -> None:
    """Sets what one accelerator trains: pictures of 14 x 14 patches, longer texts."""
    config.data.image_size = 224
    config.model.modalities.image.patch = 16
    config.model.modalities.text.length = 64
    config.model.width = 512
    config.model.layers = 6
    config.model.heads = 8
    config.model.feed_forward = 2048
