"""The recipe `configs/coco.py` in phases, with the FLOPs of a single phase of all objectives.

    python -m unified_mm.main --config=experiments/phased.py:tiny,three --workdir=runs/three

`two` trains contrast first, then captioning and contrast together; `three` trains text alone,
contrast, and then both. A phase of one objective takes more steps for its share of the FLOPs. Each
has a warm-up and a cosine of its own. In the phase of text alone, the withheld images are computed
and cost what they always cost.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe
from unified_mm.default_config import phase

coco = load_recipe(Path(__file__).parents[1] / "configs" / "coco.py")
STEPS = {"tiny": 240, "base": 40_000}  # of one phase of everything
# FLOPs of an example by what is learned, over those of both together (`unified_mm.sizes`).
COST = {
    "tiny": {"captioning": 0.768, "contrastive": 0.737},
    "base": {"captioning": 0.819, "contrastive": 0.769},
}
WARMUP = {"tiny": 1 / 8, "base": 1 / 40}  # of each phase, as of the whole without phases
# Share of all FLOPs that goes into captioning alone and into contrast alone.
SHARES = {"two": (0.0, 0.3), "three": (0.2, 0.3)}


def get_config(spec: str) -> ConfigDict:
    """Returns the config for `SIZE,KIND`: tiny or base; two or three."""
    size, _, kind = spec.partition(",")
    if size not in STEPS or kind not in SHARES:
        raise ValueError(f"{spec!r}: give SIZE,KIND of {', '.join(STEPS)}; {', '.join(SHARES)}")
    config = coco.get_config(size)
    text, contrast = SHARES[kind]
    cost = COST[size]
    phases = {
        "phase_0": part(
            size,
            text / cost["captioning"],
            data="text",
            objectives={"captioning": 1.0, "contrastive": 0.0},
        ),
        "phase_1": part(
            size,
            contrast / cost["contrastive"],
            objectives={"captioning": 0.0, "contrastive": 1.0},
        ),
        "phase_2": part(size, 1 - text - contrast),
    }
    config.train.phases = phases
    config.train.steps = sum(each["steps"] for each in phases.values())
    return config


def part(size: str, share: float, **changes: Any) -> dict:
    """Returns a phase that takes a share of the steps."""
    steps = round(share * STEPS[size])
    return phase(steps, train={"warmup_steps": round(WARMUP[size] * steps)}, **changes)
