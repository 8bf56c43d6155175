"""Early fusion with experts in every second block, on MS-COCO captions or on the embedded world.

    python -m unified_mm.main --config=configs/coco_experts.py --workdir=runs/experts
    python -m unified_mm.main --config=configs/coco_experts.py --workdir=runs/upcycled \\
        --config.model.start_from.whole=runs/first \\
        --config.model.feed_forward_options.gate=normalised

The second run begins with copies of a dense run's feed-forward as its experts. The fields of
`model.feed_forward_options` are those of `unified_mm.nn.experts.Experts`.

| size | parameters | active | hardware | time | text-to-image R@1, R@10 |
| --- | --- | --- | --- | --- | --- |
| `tiny` | 3.2 M | 1.4 M | 2 CPU cores | not measured | not measured |
"""

from pathlib import Path

from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe
from unified_mm.default_config import own_options
from unified_mm.nn.experts import Experts

coco = load_recipe(Path(__file__).with_name("coco.py"))

# Rooms are of pictures, of 16 together: a text whose end was dropped is written without an end.
CHOSEN = {"every": 2, "order": "priority", "group": 16, "drop_text": False}


def get_config(size: str = "auto") -> ConfigDict:
    """The recipe at a size; 'auto' is resolved by the command once jax has its devices."""
    config = coco.get_config(size)
    config.model.feed_forward_type = "experts"
    config.model.feed_forward_options = own_options(Experts) | CHOSEN
    config.objectives.routing.weight = 1.0
    return config
