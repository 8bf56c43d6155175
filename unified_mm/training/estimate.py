"""Estimates of a training step on chips that need not be there, as plain numbers."""

from __future__ import annotations

from typing import Any

from unified_mm.costs.chips import Chip
from unified_mm.costs.collectives import totals_by_kind
from unified_mm.costs.roofline import roofline, sending_seconds, utilisation
from unified_mm.parallel.sharding import shard_bytes
from unified_mm.task import parameter_counts
from unified_mm.training.ahead import DoesNotFit, compile_step, footprint
from unified_mm.training.phases import Phase, computed_flops, training_flops

Facts = dict[str, Any]


def estimate(phase: Phase, chip: Chip | None) -> Facts:
    """Compiles the step of a phase and estimates its cost; values that are not known are None.

    Args:
      phase: a phase on a mesh of the chips.
      chip: the peaks of each chip; without it there is no estimate of time, and everything fits.

    Returns:
      `parameters`, `flops`, `computed_flops` (recomputation included): of all chips together. Sizes
      in bytes (`peak_bytes` is everything that is there at once) and `collectives` by kind: of one
      chip. Seconds of a step at the chip's peaks: see `costs.roofline`. `mfu` is of `peak_flops`,
      the chip's dense bfloat16 peak. `fits`, and `problem`, what to change where it does not.
    """
    facts = asked(phase, chip)
    try:
        facts |= taken(phase, chip, facts)
    except DoesNotFit as error:
        # The compiler tells of the temporaries alone, or of everything.
        facts |= {"fits": False, "peak_bytes": error.needed, "memory_bytes": error.there}
        facts["refusal"] = str(error)
    if not facts["fits"]:
        facts["problem"] = problem(facts)
    return facts


def asked(phase: Phase, chip: Chip | None) -> Facts:
    """Returns what is known before anything is compiled; the rest is None."""
    mesh, options = phase.placement.mesh, phase.task.model.options
    unknown = ("temporary_bytes", "peak_bytes", "traffic_bytes", "collectives", "compute_seconds")
    times = ("memory_seconds", "collective_seconds", "step_seconds", "serial_seconds", "bound")
    shares = ("mfu", "serial_mfu", "scaling_efficiency", "serial_scaling_efficiency")
    return {
        "chips": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "phase": phase.name,
        "batch_size": phase.batch_size,
        "micro_batches": phase.micro_batches,
        "dtype": str(options.dtype),
        "remat": options.remat,
        "parameters": sum(parameter_counts(phase.abstract.params).values()),
        "parameter_bytes": shard_bytes(phase.abstract.params),
        "optimizer_bytes": shard_bytes(phase.abstract.optimizer),
        "memory_bytes": chip.memory if chip else None,
        "peak_flops": chip.flops if chip else None,
        "flops": training_flops(phase),
        "computed_flops": computed_flops(phase),
        **dict.fromkeys((*unknown, *times, *shares, "compile_seconds", "problem")),
    }


def taken(phase: Phase, chip: Chip | None, facts: Facts) -> Facts:
    """Compiles the step and returns its cost, with estimated times if the chip's peaks are known.

    Raises:
      DoesNotFit: the devices have too little memory.
    """
    compiled, seconds = compile_step(phase)
    found = footprint(compiled)
    told: Facts = {
        "temporary_bytes": found.temporary,
        "peak_bytes": found.peak,
        "traffic_bytes": found.traffic,
        "collectives": totals_by_kind(found.collectives),
        "fits": chip is None or found.peak <= chip.memory,
        "compile_seconds": round(seconds, 1),
    }
    if chip is None:
        return told
    chips = facts["chips"]
    sending = sending_seconds(chip, found.collectives)
    least = roofline(chip, facts["computed_flops"] / chips, found.traffic, sending)
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
        "serial_scaling_efficiency": least.serial_scaling_efficiency,
    }


def problem(facts: Facts) -> str:
    """Says by how much a step is too large, and what to change."""
    needed, there = facts["peak_bytes"], facts["memory_bytes"]
    hints = []
    # Gradients take as much as the parameters do.
    state = 2 * facts["parameter_bytes"] + facts["optimizer_bytes"]
    if 2 * state > there:
        hints.append(
            f"divide parameters, gradients and optimizer state ({state:,} bytes a chip) over more "
            "chips (mesh.fsdp, mesh.tensor, mesh.stage, a larger topology)"
        )
    if facts["remat"] == "none":
        hints.append("recompute activations (model.remat=full)")
    hints.append("take a smaller train.batch_size, or more train.micro_batches")
    if facts["dtype"] == "float32":
        hints.append("compute in half the bits (model.dtype=bfloat16)")
    return (
        f"does not fit: a chip needs {needed:,} bytes and has {there:,}, {needed - there:,} too "
        f"few; {'; or '.join(hints)}"
    )


def lines(facts: Facts) -> list[str]:
    """Formats the facts as lines for people to read."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1)
    rows = [
        f"{facts['chips']} chips, mesh {mesh or 'of one device'}, batch {facts['batch_size']}",
        f"{'parameters':<26}{facts['parameters']:>20,}",
        f"{'FLOPs a step':<26}{facts['flops']:>20.4g}, {facts['computed_flops']:.4g} computed",
    ]
    for name in ("parameter", "optimizer", "temporary", "peak", "memory", "traffic"):
        if (size := facts[f"{name}_bytes"]) is not None:
            rows.append(f"{name + ' bytes a chip':<26}{size:>20,}")
    for kind, total in (facts["collectives"] or {}).items():
        rows.append(
            f"{kind:<26}{total['count']:>20,} a step ({total['asynchronous']:,} asynchronous), "
            f"{total['bytes']:,} bytes, {total['sent']:,} sent"
        )
    if facts["step_seconds"] is None:
        return rows
    for name in ("compute", "memory", "collective", "step", "serial"):
        rows.append(f"{name + ' seconds at least':<26}{facts[f'{name}_seconds']:>20.4f}")
    rows.append(
        f"bound by {facts['bound']}; MFU {facts['mfu']:.2f} of "
        f"{facts['peak_flops'] / 1e12:g} TFLOP/s (dense bfloat16), scaling efficiency "
        f"{facts['scaling_efficiency']:.2f}, or where collectives wait {facts['serial_mfu']:.2f} "
        f"and {facts['serial_scaling_efficiency']:.2f}"
    )
    return rows
