"""Bytes that a compiled step moves between a chip's memory and its compute units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from unified_mm.costs.collectives import collectives_once, kind_of
from unified_mm.costs.hlo import Instruction, Program, Run, array_bytes

# What moves nothing by itself.
STILL = frozenset(
    "after-all async-start bitcast call conditional constant get-tuple-element opt-barrier"
    " parameter partition-id replica-id tuple while".split()
)
LIBRARIES = ("__cublas", "__cudnn")  # calls of these hold, as a last result, room to work in
SLICES = ("dynamic-slice", "slice", "gather")


def memory_traffic(program: Program) -> int:
    """Returns the bytes that one device reads from and writes to its memory in a step.

    Every kernel counts as reading its operands and writing its results once; where it reads or
    changes only a slice of an array, only the slice counts. Arrays that the compiler keeps in
    another memory space (on a TPU, the one beside the compute units) cost nothing. Loops count as
    often as they run, and conditionals as the branch that moves the most: see
    `costs.hlo.Program.runs`.
    """

    def moved(run: Run) -> int:
        if kind_of(run.line):
            return run.times * _own_traffic(run, program)
        return 0 if run.fused else run.times * _traffic(run, program)

    return sum(moved(run) for run in collectives_once(program.runs(moved)))


def _traffic(run: Run, program: Program) -> int:
    line = run.line
    around = program.computations[run.computation]
    if line.opcode in STILL or line.opcode.endswith("-done"):
        return 0
    if line.opcode == "fusion":
        return sum(_fusion_traffic(program.computations[name]) for name in line.calls)
    if line.opcode in SLICES:
        return 2 * array_bytes(line.type)
    if line.opcode.removesuffix("-start") in SLICES:  # its tuple holds what it takes a slice of
        return array_bytes(line.type) - sum(array_bytes(around[n].type) for n in line.operands)
    if line.opcode == "custom-call":
        return _custom_traffic(run, program)
    if line.opcode == "dynamic-update-slice":
        return 2 * array_bytes(around[line.operands[1]].type)
    return _own_traffic(run, program)


def _custom_traffic(run: Run, program: Program) -> int:
    """Returns the bytes that a kernel of a library moves: its operands and its results, once.

    For cuDNN's attention that is the formula of Dao et al. 2022 for keys and values of a head that
    fit beside the compute units. Room to work in is no result.
    """
    if not run.line.operands:  # room that nothing is written to
        return 0
    target = run.line.attribute(r'custom_call_target="([^"]*)"')
    room = r"[su]8\[\d*\]\{0\}" if target.startswith(LIBRARIES) else r"$^"
    line = replace(run.line, type=re.sub(room, "", run.line.type))
    return _own_traffic(replace(run, line=line), program)


def _own_traffic(run: Run, program: Program) -> int:
    """Returns the bytes that an instruction reads and writes by itself."""
    written = _near(run.line.type)
    if run.line.type.startswith("(") and run.line.opcode.endswith("-start"):
        return written  # its tuple holds what it reads, too
    around = program.computations[run.computation]
    return written + sum(_near(around[name].type) for name in run.line.operands)


def _fusion_traffic(lines: Mapping[str, Instruction]) -> int:
    """Returns the bytes of a kernel: its parameters, or the slices it reads, and its results."""
    users: dict[str, list[Instruction]] = {}
    for line in lines.values():
        for name in line.operands:
            users.setdefault(name, []).append(line)

    def read(name: str, whole: int) -> int:
        total = 0
        for user in users.get(name, ()):
            first = user.operands[0] == name
            if user.opcode == "bitcast":
                total += read(user.name, whole)
            elif user.opcode in SLICES and first:
                total += array_bytes(user.type)
            elif _passes(user) or (user.opcode == "dynamic-update-slice" and first):
                continue
            else:
                total += whole
        return min(total, whole)

    def written(line: Instruction) -> int:
        if line.opcode == "tuple":
            return sum(written(lines[name]) for name in line.operands)
        if line.opcode == "bitcast" and _near(line.type):
            return written(lines[line.operands[0]])
        if line.opcode == "dynamic-update-slice" and _near(line.type):
            return array_bytes(lines[line.operands[1]].type)
        return 0 if line.opcode == "parameter" or _passes(line) else _near(line.type)

    parameters = [line for line in lines.values() if line.opcode == "parameter"]
    return sum(read(line.name, _near(line.type)) for line in parameters) + sum(
        written(line) for line in lines.values() if line.root
    )


def _passes(line: Instruction) -> bool:
    """Returns whether an instruction within a kernel only passes its operands on.

    Collectives in progress are among these: `memory_traffic` counts their bytes as collectives.
    """
    return (
        kind_of(line) is not None
        or line.opcode == "tuple"
        or "AsyncCollective" in line.attribute(r'custom_call_target="([^"]*)"')
    )


def _near(type_: str) -> int:
    """Returns the bytes of a type's arrays that are in the chip's memory, and no other space."""
    return array_bytes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\([^}]*\}", "", type_))
