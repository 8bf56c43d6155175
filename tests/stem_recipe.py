"""A recipe with a small frozen stem, for tests."""

from unified_mm.default_config import default_config


def get_config():
    config = default_config()
    image = config.model.modalities.image
    image.stem, image.patch = "nfnet", 4
    image.stem_options = {"channels": (4,), "blocks": (1,)}
    config.data.views = 2
    config.train.freeze_rules = (("embedders_image/stem/.*", True), (".*", False))
    return config
