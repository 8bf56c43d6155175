"""Bytes that a compiled step moves between a chip's memory and its compute units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from unified_mm.costs.collectives import collectives_once, kind_of
from unified_mm.costs.hlo import Instruction, Program, Run, array_bytes, array_size

# What moves nothing by itself.
STILL = frozenset(
    "after-all async-start bitcast call conditional constant get-tuple-element opt-barrier"
    " parameter partition-id replica-id tuple while".split()
)
LIBRARIES = ("__cublas", "__cudnn")  # calls of these hold, as a last result, room to work in
SLICES = ("dynamic-slice", "slice", "gather")
SAME = ("convert", "copy", "transpose")  # who reads a share of the result, reads it of the operand


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
        return Kernel(program.computations[line.calls[0]], program).traffic()
    if line.opcode in SLICES:
        source = around[line.operands[0]].type
        return (_near(source) > 0) * array_bytes(line.type) + _near(line.type)
    if line.opcode.removesuffix("-start") in SLICES:  # its tuple holds what it takes a slice of
        return array_bytes(line.type) - sum(array_bytes(around[n].type) for n in line.operands)
    if line.opcode == "custom-call":
        return _custom_traffic(run, program)
    if line.opcode == "dynamic-update-slice":
        part = around[line.operands[1]].type
        return _near(part) + (_near(line.type) > 0) * array_bytes(part)
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


@dataclass(frozen=True)
class Kernel:
    """A fusion, whose inner arrays are computed and never written.

    Attributes:
      lines: its instructions by name; some are fusions themselves.
      program: whose it is.
      read: which share of its result the kernel around it reads; None where it is written.
    """

    lines: Mapping[str, Instruction]
    program: Program
    read: float | None = None

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each."""
        found: dict[str, list[Instruction]] = {}
        for line in self.lines.values():
            for name in dict.fromkeys(line.operands):
                found.setdefault(name, []).append(line)
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        lines = (line for line in self.lines.values() if line.opcode == "parameter")
        return {int(line.attributes.strip("()")): line for line in lines}

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the kernel's."""
        return next(line for line in self.lines.values() if line.root)

    @cached_property
    def results(self) -> frozenset[str]:
        """The names of what the kernel hands out."""
        found = [self.root]
        for line in found:  # which grows
            if line.opcode in ("tuple", "bitcast"):
                found += [self.lines[name] for name in line.operands]
        return frozenset(line.name for line in found)

    def within(self, line: Instruction) -> Kernel:
        """Returns the kernel that one of the instructions is, as part of this one."""
        written = self.read is None and line.name in self.results
        read = None if written else self.share(line.name)
        return Kernel(self.program.computations[line.calls[0]], self.program, read)

    def traffic(self) -> int:
        """Returns the bytes of the parameters, or of the slices it reads, and of the results."""
        parameters = self.parameters.values()
        read = sum(round(_near(line.type) * self.share(line.name)) for line in parameters)
        return read + self.written(self.root)

    def share(self, name: str) -> float:
        """Returns which share of an array is read."""
        shares = [self.used(name, user) for user in self.users.get(name, ())]
        if self.read is not None and self.lines[name].root:
            shares.append(self.read)
        return min(1.0, sum(shares))

    def used(self, name: str, user: Instruction) -> float:
        """Returns which share of an array an instruction reads."""
        places = [place for place, operand in enumerate(user.operands) if operand == name]
        written = self.read is None and user.name in self.results
        if user.opcode in SLICES and places == [0]:
            return array_size(user.type) / max(1, array_size(self.lines[name].type))
        if user.opcode == "dynamic-update-slice" and places == [0]:
            return 0.0 if written else self.share(user.name)
        if user.opcode == "bitcast" or (user.opcode in SAME and not written):
            return self.share(user.name)
        if user.opcode == "fusion":
            inner = self.within(user)
            return sum(inner.share(inner.parameters[place].name) for place in places)
        if user.opcode == "tuple" and self.read is not None:
            return self.read
        return 0.0 if _passes(user) else 1.0

    def written(self, line: Instruction) -> int:
        """Returns the bytes that are written of a result."""
        if line.opcode == "tuple":
            return sum(self.written(self.lines[name]) for name in line.operands)
        if not _near(line.type) or line.opcode == "parameter" or _passes(line):
            return 0
        if line.opcode == "bitcast":
            return self.written(self.lines[line.operands[0]])
        if line.opcode == "dynamic-update-slice":
            return array_bytes(self.lines[line.operands[1]].type)
        if line.opcode == "fusion":
            inner = self.within(line)
            return inner.written(inner.root)
        return _near(line.type)


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
