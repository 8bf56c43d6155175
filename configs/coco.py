"""Early fusion on MS-COCO captions, or on the embedded world where no data is given.

    python -m unified_mm.main --config=configs/coco.py --workdir=runs/first
    python -m unified_mm.main --config=configs/coco.py:base --config.data.dir=DIR --workdir=runs/2

| size | parameters | hardware | time | text-to-image R@1, R@10 |
| --- | --- | --- | --- | --- |
| `tiny` | 0.9 M | 2 CPU cores | 12 minutes, 1,500 steps | 0.694, 0.963 (1,000 world scenes) |
| `base` | 23.8 M | one accelerator | not measured | not measured |
| `large` | 322 M | several accelerators | not measured | not measured |
| `10b` | 10.3 B | 256 chips of v6e | compiled, never run | not measured |
| `70b` | 71.2 B | 1,024 chips of v5p | compiled, never run | not measured |

Parameters are those of `python -m unified_mm.sizes`, with the largest vocabulary that the tokenizer
may have: the world's captions fill a smaller one (`tiny` then has 0.6 M, `large` 305 M).
One caption an image, the mean of three seeds; chance is 0.001 and 0.010. All other scores:
experiments/RESULTS.md.
"""

from ml_collections import ConfigDict

from unified_mm.default_config import default_config

# Size -> width, layers, heads, feed-forward.
SHAPES = {
    "base": (512, 6, 8, 2048),
    "large": (2048, 6, 16, 8192),
    "10b": (5120, 32, 40, 20480),
    "70b": (8192, 88, 64, 32768),
}
TENSOR = {"10b": 2, "70b": 4}  # chips that share heads and feed-forward
SIZES = ("tiny", *SHAPES)


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    config = of_size(size)
    if size in ("auto", "tiny"):
        quick(config)
    return config


def of_size(size: str) -> ConfigDict:
    """What recipes of several phases begin with too: all but what `quick` chooses."""
    config = default_config()
    config.size = size
    config.data.mirror = False  # captions name sides, in whatever language
    config.model.dtype = "auto"
    if size in ("auto", "tiny"):
        tiny(config)
    elif size in SHAPES:
        photographs(config)
        shape(config, size)
        if size != "base":
            divided(config)
        if size in TENSOR:
            pod(config)
            config.mesh.tensor = TENSOR[size]
    else:
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}, or none for auto")
    return config


def tiny(config: ConfigDict) -> None:
    """Two CPU cores, minutes."""
    config.data.crop_scale = (0.85, 1.0)
    config.data.crop_ratio = (0.95, 1.05)
    config.data.vocabulary_size = 4096
    config.model.modalities.image.stem = "hierarchical"
    config.model.modalities.text.length = 32
    config.model.unroll = 4
    config.train.steps = 1000
    config.train.batch_size = 64  # half the usual: on few cores, more steps beat larger ones
    config.train.learning_rate = 2e-3


def quick(config: ConfigDict) -> None:
    """Many examples, seen whole by a smaller model, which learns most in the same minutes.

    Found on a world of another seed: experiments/quick_start.py.
    """
    config.data.crop_scale = config.data.crop_ratio = (1.0, 1.0)
    config.model.width, config.model.heads, config.model.feed_forward = 96, 3, 384
    config.model.modalities.image.patch = 16
    config.objectives.captioning.weight = 4.0
    config.train.optimizer = "muon"
    config.train.learning_rate = 8e-3
    config.train.warmup_steps = 100
    config.train.batch_size = 128  # in larger batches pictures are told apart from more others
    config.train.steps = 1500
    config.checkpoint.every = 300


def photographs(config: ConfigDict) -> None:
    """Pictures of 14 x 14 patches, longer texts."""
    config.data.image_size = 224
    config.model.modalities.image.patch = 16
    config.model.modalities.text.length = 64


def shape(config: ConfigDict, size: str) -> None:
    """The transformer, by the table."""
    model = config.model
    model.width, model.layers, model.heads, model.feed_forward = SHAPES[size]
    if model.layers <= 6:
        # A scan stacks what the backward pass needs, which an accelerator writes and reads again:
        # without it a step moves 0.58 of the bytes (`base`, one H100), and compiles for longer.
        model.unroll = model.layers


def divided(config: ConfigDict) -> None:
    """Everything divided over all devices."""
    config.model.dtype = "bfloat16"
    config.mesh.data = 1
    config.mesh.fsdp = -1


def pod(config: ConfigDict) -> None:
    """Hundreds of chips: large batches, activations computed again."""
    config.data.vocabulary_size = 32768
    config.model.remat = "full"
    config.objectives.contrastive.width = 1024
    config.train.batch_size = 4096
    config.train.learning_rate = 1.5e-4
    config.train.warmup_steps = 2000
    config.train.steps = 100_000
    config.evaluation.batch_size = 512
