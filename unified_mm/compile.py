"""Compiles the training step for hardware that is not there, and estimates what it would take.

    python -m unified_mm.compile --config=configs/coco.py:large --topology=v5e:4x4
    python -m unified_mm.compile --config=configs/coco.py:large --topology=h100:8

Needs no data, no TPU and no GPU, but the compiler of one (the extras 'tpu' and 'cuda12'). All
arrays are abstract, so a model of any size can be compiled. The times are lower bounds from the
chip's peaks (see `costs.roofline`), not measurements. Of a GPU's memory jax takes 0.75, or what
XLA_CLIENT_MEM_FRACTION says, and a step fits that. The last line printed is JSON; for its
fields see `training.estimate.estimate`. The exit code is 1 if the step does not fit into memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib import metadata

import jax

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.cli.recipes import resolve
from unified_mm.config import Config
from unified_mm.costs.chips import Chip, Gpu, Tpu
from unified_mm.costs.memory_share import memory_share
from unified_mm.costs.topologies import target
from unified_mm.runs.environment import revision, versions
from unified_mm.training.ahead import abstract_phases
from unified_mm.training.estimate import estimate, lines
from unified_mm.training.phases import Phase


@command("compile", __doc__, takes=("config", "topology", "phase"), recipe="coco")
def main(options: argparse.Namespace) -> int:
    """Compiles the step, prints the estimate and returns the exit code, 1 if it does not fit."""
    # No process can read what was compiled for devices that are not there; and what compiling
    # takes is said.
    jax.config.update("jax_enable_compilation_cache", False)
    devices, chip = target(options.topology)
    asked = resolve(options.recipe, say, platform=devices[0].platform)
    config = Config(asked.to_dict())
    phase = choose(abstract_phases(config, devices), options.phase)
    about = {
        "topology": options.topology,
        "versions": versions() | compiler(chip),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if isinstance(chip, Gpu):
        about["memory_share"] = memory_share(os.environ)
    facts = estimate(phase, chip)
    say(f"{options.topology}: " + "\n".join(lines(facts)))
    if facts["problem"]:
        say(facts["problem"])
    say(json.dumps(about | facts))
    return 0 if facts["fits"] else 1


def compiler(chip: Chip | None) -> dict[str, str]:
    """Returns the versions of what compiles for a chip."""
    packages = {Tpu: ("libtpu",), Gpu: ("jax-cuda12-plugin", "jax-cuda13-plugin")}
    found = {}
    for name in packages.get(type(chip), ()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
