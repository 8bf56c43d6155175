"""Compiles the training step for hardware that is not there, and says what it would take.

    python -m unified_mm.compile --config=configs/coco.py:large --topology=v5e:4x4 \
        --config.mesh.tensor=2 --config.mesh.fsdp=-1 --config.mesh.data=1

Needs no data and no TPU, but a TPU's compiler (the extra 'tpu'). Everything is abstract: a model's
size costs nothing. The times are the least that the chip's peaks allow (see `parallel.roofline`),
not measurements. One line of JSON comes last: `parameters`, `flops` and `computed_flops` (those of
the model, and with what is computed again) are of all chips together; every size in bytes, and the
collectives' counts, are of one chip and one step. The exit code is 1 where the step does not fit.
"""

from __future__ import annotations

import json
import time
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from unified_mm.commands import exit_code, say
from unified_mm.config import Config
from unified_mm.objectives.task import parameter_counts
from unified_mm.parallel.chips import Chip, target
from unified_mm.parallel.collectives import totals_by_kind
from unified_mm.parallel.roofline import roofline, utilisation
from unified_mm.recipes import parse_flags, resolve
from unified_mm.training.ahead import (
    DoesNotFit,
    Footprint,
    compile_step,
    footprint,
    plan,
    shard_bytes,
)
from unified_mm.training.environment import revision, versions
from unified_mm.training.flops import computed_flops, training_flops
from unified_mm.training.phases import Phase

CONFIG = config_flags.DEFINE_config_file("config", "configs/coco.py", "The recipe to compile.")
TOPOLOGY = flags.DEFINE_string(
    "topology", "v5e:4x4", "What to compile for, e.g. v5p:8x8x16, cpu:8."
)
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
    facts = what_is_asked(phase, chip)
    try:
        compiled, seconds = compile_step(phase, config.train.average_decay)
    except DoesNotFit as error:
        facts |= {"fits": False, "peak_bytes": error.needed, "memory_bytes": error.there}
        say_facts(facts)
        say(f"does not fit: {error}")
    else:
        facts |= what_it_takes(footprint(compiled), facts, chip)
        facts["compile_seconds"] = round(seconds, 1)
        say_facts(facts)
    if not facts["fits"]:
        say(advice(facts, phase))
    say(json.dumps(facts))
    return 0 if facts["fits"] else 1


def choose(phases: tuple[Phase, ...], name: str) -> Phase:
    """The phase of a name, or the first.

    Raises:
      ValueError: with the names that there are.
    """
    found = [phase for phase in phases if phase.name == (name or phases[0].name)]
    if not found:
        names = ", ".join(phase.name for phase in phases)
        raise ValueError(f"--phase={name} is no phase of this recipe; there are {names}")
    return found[0]


def what_is_asked(phase: Phase, chip: Chip | None) -> dict[str, Any]:
    """What is known before anything is compiled."""
    mesh = phase.placement.mesh
    return {
        "topology": TOPOLOGY.value,
        "chips": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "phase": phase.name,
        "batch_size": phase.batch_size,
        "micro_batches": phase.micro_batches,
        "dtype": str(phase.task.model.options.dtype),
        "parameters": sum(parameter_counts(phase.abstract.params).values()),
        "parameter_bytes": shard_bytes(phase.abstract.params),
        "optimizer_bytes": shard_bytes(phase.abstract.optimizer),
        "memory_bytes": chip.memory if chip else None,
        "flops": training_flops(phase),
        "computed_flops": computed_flops(phase),
        "versions": versions(),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


def what_it_takes(found: Footprint, facts: dict[str, Any], chip: Chip | None) -> dict[str, Any]:
    """What the compiled step says, and the estimate where the chip's peaks are known."""
    told: dict[str, Any] = {
        "temporary_bytes": found.temporary,
        "peak_bytes": found.peak,
        "traffic_bytes": found.traffic,
        "collectives": totals_by_kind(found.collectives),
        "fits": chip is None or found.peak <= chip.memory,
        "step_seconds": None,
    }
    if chip is None:
        return told
    chips = facts["chips"]
    sent = sum(each.sent for each in found.collectives)
    least = roofline(chip, facts["computed_flops"] / chips, found.traffic, sent)
    return told | {
        "compute_seconds": least.compute,
        "memory_seconds": least.memory,
        "collective_seconds": least.collectives,
        "step_seconds": least.step,
        "serial_seconds": least.serial,
        "bound": least.bound,
        "mfu": utilisation(chip, chips, facts["flops"], least.step),
        "serial_mfu": utilisation(chip, chips, facts["flops"], least.serial),
        "scaling_efficiency": least.scaling_efficiency,
    }


def say_facts(facts: dict[str, Any]) -> None:
    """The facts as a table for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    say(f"{facts['topology']}: {facts['chips']} chips, mesh {mesh}, batch {facts['batch_size']}")
    say(f"{'parameters':<26}{facts['parameters']:>20,}")
    say(f"{'FLOPs a step':<26}{facts['flops']:>20.4g}  (computed: {facts['computed_flops']:.4g})")
    for name in ("parameter", "optimizer", "temporary", "peak", "memory", "traffic"):
        if facts.get(f"{name}_bytes"):
            say(f"{name + ' bytes a chip':<26}{facts[f'{name}_bytes']:>20,}")
    for kind, total in facts.get("collectives", {}).items():
        say(f"{kind:<26}{total['count']:>20,} x, {total['bytes']:,} bytes, {total['sent']:,} sent")
    if facts.get("step_seconds") is None:
        return
    for name in ("compute", "memory", "collective", "step", "serial"):
        say(f"{'least ' + name + ' seconds':<26}{facts[f'{name}_seconds']:>20.4f}")
    say(
        f"bound by {facts['bound']}: MFU at most {facts['mfu']:.2f} ({facts['serial_mfu']:.2f} "
        f"where collectives wait), scaling efficiency {facts['scaling_efficiency']:.2f}"
    )


def advice(facts: dict[str, Any], phase: Phase) -> str:
    """What to change where a step does not fit."""
    over = (facts["peak_bytes"] or 0) - (facts["memory_bytes"] or 0)
    state = facts["parameter_bytes"] + facts["optimizer_bytes"]
    hints = []
    # Gradients take as much as the parameters do.
    if 2 * (state + facts["parameter_bytes"]) > (facts["memory_bytes"] or 0):
        hints.append("divide the state over more chips (mesh.fsdp, mesh.tensor, a larger topology)")
    if phase.task.model.options.remat == "none":
        hints.append("recompute activations (model.remat='full')")
    hints.append("take a smaller train.batch_size, or more train.micro_batches")
    if facts["dtype"] != "bfloat16":
        hints.append("compute in bfloat16 (model.dtype=bfloat16)")
    return f"too large by {over:,} bytes a chip: {'; or '.join(hints)}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
