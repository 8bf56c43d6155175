"""Captions find their clip: one transformer over tubelets of frames.

    python -m unified_mm.main --config=configs/video.py --workdir=runs/clips
    python -m unified_mm.main --config=configs/video.py:base --config.data.dir=DIR --workdir=runs/2

Without data it learns a small set that it draws itself: two solids that move one way, and hit or
pass. A folder has a folder a class (UCF101), MSR-VTT's JSON, a table of files and captions, or
COCO's JSON with `video` in place of `file_name`. Containers need `pip install unified_mm[video]`.

| size | parameters | hardware | time | caption to clip R@1, R@10; direction, event |
| --- | --- | --- | --- | --- |
| `tiny` | 0.68 M | 2 CPU cores | 800 steps, 11 CPU minutes | 0.598, 1.000; 1.000, 0.932 |
| `base` | not counted | one accelerator | not measured | not measured |

Scores are of 400 clips that it draws, one seed; captions that are equal bound R@1 at 0.955.
Direction and event are `foil/video/accuracy/...`: how often a clip is nearer to its caption than to
the same with one word made false. `tiny` learns from such foils too, of the training captions: for
clips of your own without them, set `--config.objectives.contrastive.foils=False`.
"""

from ml_collections import ConfigDict

from unified_mm.config import defaults_of
from unified_mm.default_config import default_config
from unified_mm.modalities.video import VideoModality

SIZES = ("tiny", "base")


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    if size not in ("auto", *SIZES):
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}, or none for auto")
    config = default_config()
    config.size = size
    config.model.dtype = "auto"
    config.data.source = "clips"
    config.data.mirror = False  # captions name sides, in whatever language
    video = {"type": "video", **defaults_of(VideoModality), "stem": "difference"}
    config.model.modalities = {"video": video, "text": config.model.modalities.text}
    config.model.start_from.video = ""  # or a run with an image tower, for fusions that have towers
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.objectives.contrastive.update({"weight": 1.0, "between": "video"})
    video = config.model.modalities.video
    if size == "base":
        config.data.image_size = 224
        config.model.update({"width": 768, "layers": 12, "heads": 12, "feed_forward": 3072})
        video.update({"frames": 16, "patch": 16})
        config.model.modalities.text.length = 64
        config.train.update({"steps": 20_000, "batch_size": 128, "learning_rate": 1e-4})
        return config
    config.objectives.contrastive.foils = True
    config.data.update({"image_size": 48, "crop_scale": (0.9, 1.0), "crop_ratio": (0.95, 1.05)})
    config.model.update({"width": 96, "layers": 4, "heads": 4, "feed_forward": 384})
    video.patch = 12
    config.model.modalities.text.length = 20
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    config.train.update({"steps": 800, "batch_size": 64})
    config.checkpoint.every = 200
    return config
