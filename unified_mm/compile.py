"""Compiles the training step for hardware that is not there, and says what it would take.

    python -m unified_mm.compile --config=configs/coco.py:large --topology=v5e:4x4

Needs no data and no TPU, but a TPU's compiler (the extra 'tpu'). Everything is abstract: a model's
size costs nothing. The times are the least that the chip's peaks allow (see `parallel.roofline`),
not measurements. One line of JSON comes last; its fields: `training.estimate.estimate`. The exit
code is 1 where the step does not fit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import metadata

from absl import app, flags, logging
from ml_collections import config_flags

from unified_mm.commands import exit_code, say
from unified_mm.config import Config
from unified_mm.parallel.chips import target
from unified_mm.recipes import parse_flags, resolve
from unified_mm.training.ahead import plan
from unified_mm.training.environment import revision, versions
from unified_mm.training.estimate import estimate, lines
from unified_mm.training.phases import Phase

CONFIG = config_flags.DEFINE_config_file("config", "configs/coco.py", "The recipe to compile.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "What for: v5e:4x4, v5p:8x8x16, cpu:8.")
PHASE = flags.DEFINE_string("phase", "", "Of train.phases; the first one by default.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise SystemExit(f"error: not a flag: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    raise SystemExit(exit_code(run, interrupted="interrupted"))


def run() -> int:
    """Compiles and prints; 1 where the step does not fit."""
    devices, chip = target(TOPOLOGY.value)
    config = Config(resolve(CONFIG.value, flags.FLAGS["config"], say).to_dict())
    phase = choose(plan(config, devices), PHASE.value)
    about = {
        "topology": TOPOLOGY.value,
        "versions": versions() | ({"libtpu": metadata.version("libtpu")} if chip else {}),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    facts = estimate(phase, chip, config.train.average_decay)
    say(f"{TOPOLOGY.value}: " + "\n".join(lines(facts)))
    if facts["problem"]:
        say(facts["problem"])
    say(json.dumps(about | facts))
    return 0 if facts["fits"] else 1


def choose(phases: Sequence[Phase], name: str) -> Phase:
    """The phase of a name, or the first.

    Raises:
      ValueError: with the names that there are.
    """
    for phase in phases:
        if phase.name == name or not name:
            return phase
    names = ", ".join(phase.name for phase in phases)
    raise ValueError(f"--phase={name} is no phase of this recipe; there are {names}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
