"""Classes of shapes: one transformer over groups of points.

    python -m unified_mm.main --config=configs/points.py --workdir=runs/solids
    python -m unified_mm.main --config=configs/points.py --config.data.dir=DIR --workdir=runs/shapes

Without data it learns a small set that it makes itself, of boxes, balls and other solids. A folder
has a folder a class (ModelNet's is one), or a csv or JSON lines that name files and classes; files
are npz, npy, ply, off, obj and glb (`pip install unified_mm[points]` for obj, glb and binary ply).

| size | parameters | hardware | time | accuracy |
| --- | --- | --- | --- | --- |
| `tiny` | 0.37 M | 2 CPU cores | 800 steps, 6 CPU minutes | 0.667 (LDraw; chance 0.09) |
| `base` | not counted | one accelerator | not measured | not measured |

One seed, 32 classes, by `experiments/clouds.py:classes`, which stretches less, mirrors and smooths
its targets; the nearest part by three sizes alone has 0.513 on the same fifth of the titles.
"""

from ml_collections import ConfigDict

from unified_mm.config import defaults_of
from unified_mm.default_config import default_config
from unified_mm.modalities.points import PointsModality

SIZES = ("tiny", "base")


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    if size not in ("auto", *SIZES):
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}, or none for auto")
    config = default_config()
    config.size = size
    config.model.dtype = "auto"
    config.data.source = "solids"
    config.model.modalities = {"points": {"type": "points", **defaults_of(PointsModality)}}
    for objective in config.objectives.values():
        objective.weight = 0.0
    config.objectives.classification.update({"weight": 1.0, "of": "points"})
    points = config.model.modalities.points
    if size == "base":
        # Point-BERT's, without what it learns before.
        config.model.update({"width": 384, "layers": 12, "heads": 6, "feed_forward": 1536})
        points.update({"stretch": 1.25})
        config.train.update({"steps": 20_000, "batch_size": 64, "learning_rate": 5e-4})
        return config
    config.model.update({"width": 96, "layers": 3, "heads": 4, "feed_forward": 384})
    points.update({"points": 512, "groups": 32, "group": 16, "hidden": 32, "stretch": 1.1})
    config.train.update({"steps": 800, "batch_size": 48})
    config.train.update({"optimizer": "muon", "learning_rate": 8e-3})
    config.checkpoint.every = 150
    return config
