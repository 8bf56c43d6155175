"""Prints the parameters and FLOPs of each fusion, for comparisons at equal cost.

    python -m unified_mm.sizes --config=configs/coco.py
    python -m unified_mm.sizes --config=configs/coco.py --config.model.budget=1e9

Each row is the config with that fusion and the objectives that it supports; with a budget, width
(or depth) is chosen to match it. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys

from ml_collections import ConfigDict

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.cli.recipes import resolve, serve_what_can_be
from unified_mm.config import Config
from unified_mm.models.unified import FUSIONS
from unified_mm.training.sizes import fit_to_budget, measure_sizes


@command("sizes", __doc__, takes=("config",), recipe="coco")
def main(options: argparse.Namespace) -> int:
    """Prints a row for each fusion and returns the exit code."""
    asked = resolve(options.recipe, say)
    rows = []
    head = ("fusion", "width", "layers", "parameters", "active", "FLOPs/example", "FLOPs/token")
    say("{:<24}{:>7}{:>8}{:>14}{:>14}{:>16}{:>14}".format(*head))
    for fusion in FUSIONS:
        config = ConfigDict(asked.to_dict())
        config.model.fusion = fusion
        config = fit_to_budget(serve_what_can_be(config, (), lambda _: None))
        sizes = measure_sizes(Config(config.to_dict()))
        token = "" if sizes.token_flops is None else f"{sizes.token_flops:,}"
        say(
            f"{fusion:<24}{config.model.width:>7}{config.model.layers:>8}{sizes.total:>14,}"
            f"{sizes.active:>14,}{sizes.training_flops:>16,}{token:>14}"
        )
        rows.append(
            {
                "fusion": fusion,
                "width": config.model.width,
                "layers": config.model.layers,
                "parameters": sizes.total,
                "active_parameters": sizes.active,
                "training_flops": sizes.training_flops,
                "token_flops": sizes.token_flops,
                "by_part": dict(sizes.parameters),
            }
        )
    say(json.dumps(rows))
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
