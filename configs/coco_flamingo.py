"""Gated cross-attention (Flamingo) on MS-COCO captions, or on the embedded world, in four phases.

    python -m unified_mm.main --config=configs/coco_flamingo.py --workdir=runs/flamingo

1. `phase_0`: the language model on text alone and the image tower by contrast (the gates are closed
   and frozen, so no text sees an image).
2. `phase_1`: the language model on documents, still blind: it meets texts of their length.
3. `phase_2`: both frozen; resampler and gated layers learn on pairs.
4. `phase_3`: the same on documents of nine images with their captions.

| size | parameters | hardware | time | CIDEr-D; with 0, 4, 8 examples in context |
| --- | --- | --- | --- | --- |
| `tiny` | 2.9 M | 2 CPU cores, shared | 37 minutes | 3.70; 3.46, 3.25, 3.00 (world scenes) |
| `base` | not counted | one accelerator | not measured | not measured |
"""

from pathlib import Path

from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe
from unified_mm.default_config import phase

coco = load_recipe(Path(__file__).with_name("coco.py"))
# What sees, and what writes.
GATED = r"(transformer/layers/cross|resamplers_image)/.*"
LANGUAGE = r"(transformer|embedders_text)/.*"


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    config = coco.of_size(size)
    config.model.fusion = "gated_cross_attention"
    config.model.unroll = 1
    config.model.resampler.latents = 64 if size in coco.SHAPES else 16
    config.objectives.captioning.rule = "interleaved_latest"
    config.model.rotary_base = 10000.0
    config.model.tower.rotary_base = 0.0  # pictures have learned positions
    config.model.modalities.text.learned_positions = False
    config.data.documents.shots = 8
    config.data.documents.images = 9
    config.data.documents.length = 320
    config.evaluation.shots = (0, 4, 8)
    captions = {"captioning": 1.0, "contrastive": 0.0}
    gated_alone = {"freeze_rules": ((GATED, False), (".*", True))}
    all_else = {"freeze_rules": ((GATED, True), (".*", False))}
    language_alone = {"freeze_rules": ((GATED, True), (LANGUAGE, False), (".*", True))}
    few = {"batch_size": 16}
    documents = {"data": "documents", "objectives": captions}
    config.train.phases = {
        "phase_0": phase(600, train=all_else),
        "phase_1": phase(100, train=language_alone | few | {"learning_rate": 5e-4}, **documents),
        "phase_2": phase(500, objectives=captions, train=gated_alone),
        "phase_3": phase(200, train=gated_alone | few, **documents),
    }
    config.train.steps = 1400
    return config
