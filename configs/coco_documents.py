"""Early fusion on MS-COCO captions, or on the embedded world: pairs, then few-shot documents.

    python -m unified_mm.main --config=configs/coco_documents.py --workdir=runs/documents

1. `phase_0`: contrast and captioning on pairs.
2. `phase_1`: captioning on documents of five images with their captions, in one sequence.

| size | parameters | hardware | time | CIDEr-D with 0, 4 examples in context |
| --- | --- | --- | --- | --- |
| `tiny` | 0.9 M | 2 CPU cores | not measured | not measured |
| `base` | not counted | one accelerator | not measured | not measured |
"""

from pathlib import Path

from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe
from unified_mm.default_config import phase

coco = load_recipe(Path(__file__).with_name("coco.py"))


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    config = coco.of_size(size)
    config.objectives.captioning.rule = "interleaved"
    config.model.modalities.text.max_positions = 224
    config.data.documents.shots = 4
    config.data.documents.images = 5
    config.data.documents.length = 192
    config.evaluation.shots = (0, 4)
    config.train.phases = {
        "phase_0": phase(800),
        "phase_1": phase(
            200,
            data="documents",
            objectives={"captioning": 1.0, "contrastive": 0.0},
            train={"batch_size": 16, "learning_rate": 1e-3},
        ),
    }
    config.train.steps = 1000
    return config
