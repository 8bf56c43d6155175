"""Compiles the training step for hardware that is not there, and estimates what it would take.

    python -m unified_mm.compile --config=configs/coco.py:large --topology=v5e:4x4

Needs no data and no TPU, but a TPU's compiler (the extra 'tpu'). All arrays are abstract, so a
model of any size can be compiled. The times are lower bounds from the chip's peaks (see
`costs.roofline`), not measurements. The last line printed is JSON; for its fields see
`training.estimate.estimate`. The exit code is 1 if the step does not fit into memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.cli.recipes import resolve
from unified_mm.config import Config
from unified_mm.costs.chips import target
from unified_mm.runs.environment import revision, versions
from unified_mm.training.ahead import abstract_phases
from unified_mm.training.estimate import estimate, lines
from unified_mm.training.phases import Phase


@command("compile", __doc__, takes=("config", "topology", "phase"), recipe="coco")
def main(options: argparse.Namespace) -> int:
    """Compiles the step, prints the estimate and returns the exit code, 1 if it does not fit."""
    devices, chip = target(options.topology)
    asked = resolve(options.recipe, say, platform=devices[0].platform)
    config = Config(asked.to_dict())
    phase = choose(abstract_phases(config, devices), options.phase)
    about = {
        "topology": options.topology,
        "versions": versions() | ({"libtpu": metadata.version("libtpu")} if chip else {}),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    facts = estimate(phase, chip, config.train.ema_decay)
    say(f"{options.topology}: " + "\n".join(lines(facts)))
    if facts["problem"]:
        say(facts["problem"])
    say(json.dumps(about | facts))
    return 0 if facts["fits"] else 1


def choose(phases: Sequence[Phase], name: str) -> Phase:
    """Returns the phase called `name`, or the first phase for ''.

    Raises:
      ValueError: if there is no phase of that name; the message lists the names.
    """
    for phase in phases:
        if phase.name == name or not name:
            return phase
    names = ", ".join(phase.name for phase in phases)
    raise ValueError(f"--phase={name} is no phase of this recipe; there are {names}")


if __name__ == "__main__":
    main(sys.argv[1:])
