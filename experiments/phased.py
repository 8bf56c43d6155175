"""The recipe of the ablations in phases, with the FLOPs of a single phase of all objectives.

    python -m unified_mm.main --config=experiments/phased.py:tiny,three --workdir=runs/three

`two` trains contrast first, then captioning and contrast together; `three` trains text alone,
contrast, and then both. A phase of one objective takes more steps for its share of the FLOPs. Each
has a warm-up and a cosine of its own. In the phase of text alone, the withheld images are computed
and cost what they always cost.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import recipe
from experiments.sweeping.presets import COST, SIZES
from unified_mm.default_config import phase

# Share of all FLOPs that goes into captioning alone and into contrast alone.
SHARES = {"two": (0.0, 0.3), "three": (0.2, 0.3)}


def get_config(spec: str) -> ConfigDict:
    """Returns the config for `SIZE,KIND`: tiny or base; two or three."""
    size, _, kind = spec.partition(",")
    if size not in SIZES or kind not in SHARES:
        raise ValueError(f"{spec!r}: give SIZE,KIND of {', '.join(SIZES)}; {', '.join(SHARES)}")
    config = recipe.get_config(size)
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
    """Returns a phase that takes a share of the steps, and warms up for as large a part of it."""
    whole, warmup = (SIZES[size][f"train.{name}"] for name in ("steps", "warmup_steps"))
    steps = round(share * whole)
    return phase(steps, train={"warmup_steps": round(warmup / whole * steps)}, **changes)
