"""EfficientNet-Lite (Tan & Le 2019): a stem of images, its batch norms folded into convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unified_mm.nn.convolution import EfficientNetLite, lite_blocks
from unified_mm.pretrained.family import Family
from unified_mm.pretrained.fields import Fields
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Array, Arrays, Entry, Table, Transform

EPSILON = 1e-3  # of its batch norms
# Channel and depth factors, and the side of the pictures that it was trained on.
FACTORS = {
    "efficientnet-lite0": (1.0, 1.0, 224),
    "efficientnet-lite1": (1.0, 1.1, 240),
    "efficientnet-lite2": (1.1, 1.2, 260),
    "efficientnet-lite3": (1.2, 1.4, 280),
    "efficientnet-lite4": (1.4, 1.8, 300),
}
STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of a batch norm
STEM = "embedders_image/stem"


def fields(source: Source) -> Fields:
    """Returns the fields of pictures that are seen by the stem; any side will do."""
    channels, depth, side = FACTORS[source.config["model_type"]]
    image = {
        "stem": "efficientnet_lite",
        "stem_options": {"channel_factor": channels, "depth_factor": depth},
        "patch": EfficientNetLite.stride,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
    }
    return {
        "data": {"image_size": side},
        "model": {"fusion": "late", "modalities": {"image": image, "text": {}}},
        "objectives": {"contrastive": {"weight": 1.0}},
    }


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of the weights without the classifier."""
    entries = [
        *convolution("_conv_stem", "_bn0", "first"),
        *convolution("_conv_head", "_bn1", "last"),
    ]
    options = config["model"]["modalities"]["image"]["stem_options"]
    for number, (expansion, *_) in enumerate(lite_blocks(**options)):
        theirs, ours = f"_blocks.{number}.", f"block_{number}/"
        if expansion > 1:
            entries += convolution(f"{theirs}_expand_conv", f"{theirs}_bn0", f"{ours}expand")
        entries += convolution(
            f"{theirs}_depthwise_conv", f"{theirs}_bn1", f"{ours}depthwise", by_channel=True
        )
        entries += convolution(f"{theirs}_project_conv", f"{theirs}_bn2", f"{ours}project")
    ignored = {
        r".*\.num_batches_tracked": "how long its batch norms learned",
        r"_fc\.(weight|bias)": "the classifier: a stem has none",
    }
    return Table(entries, ignored)


def convolution(theirs: str, norm: str, ours: str, by_channel: bool = False) -> list[Entry]:
    """Returns the entry of a convolution without a bias and of the batch norm after it.

    Args:
      theirs: name of their convolution.
      norm: name of their batch norm.
      ours: path of our convolution within the stem.
      by_channel: whether each channel is convolved by itself.
    """

    def folded(kernel: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Arrays:
        scale = scale / np.sqrt(variance + EPSILON)
        kernel = np.moveaxis(kernel * scale[:, None, None, None], (2, 3, 1, 0), (0, 1, 2, 3))
        return kernel[:, :, 0] if by_channel else kernel, bias - mean * scale

    names = (f"{theirs}.weight", *(f"{norm}.{each}" for each in STATISTICS))
    paths = tuple(f"{STEM}/{ours}/{leaf}" for leaf in ("kernel", "bias"))
    return [Entry(names, paths, Transform(folded, None))]


EFFICIENTNET_LITE = Family("EfficientNet-Lite", tuple(FACTORS), "stem", fields, table)
