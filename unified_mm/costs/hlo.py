"""A compiled program, read from its optimised HLO text: what runs in a step, and how often."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

NAME = r"%([\w.\-]+)"
# Opcode -> the attribute that names what it runs. The functions of reductions are left out.
CALLS = {
    "fusion": r"\bcalls={name}",
    "call": r"\bto_apply={name}",
    "while": r"\bbody={name}",
    "async-start": r"\bcalls={name}",
    "conditional": r"\b(?:true|false)_computation={name}",
}


@dataclass(frozen=True)
class Instruction:
    """One instruction, a line of the text: `%name = type opcode(%operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # of a constant its value, of a parameter its number, in parentheses
    root: bool  # whether it is its computation's result

    @classmethod
    def parse(cls, line: str) -> Instruction | None:
        """Returns the instruction of a line, or None where the line holds none."""
        found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        if not found:
            return None
        root, name, type_, opcode = found.groups()
        operands, attributes = _parenthesis(line[found.end() - 1 :])
        names = tuple(re.findall(NAME, operands))
        rest = operands if opcode in ("constant", "parameter") else attributes
        return cls(name, type_, opcode, names, rest, bool(root))

    def attribute(self, pattern: str) -> str:
        """Returns the first group of a pattern's match in the attributes, or '' without one."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    @property
    def calls(self) -> list[str]:
        """The names of the computations that it runs."""
        if self.opcode not in CALLS:
            return []
        branches = self.attribute(r"\bbranch_computations=\{([^}]*)\}")
        return re.findall(CALLS[self.opcode].format(name=NAME), self.attributes) + re.findall(
            NAME, branches
        )


@dataclass(frozen=True)
class Run:
    """An instruction, with how often a step runs it.

    Attributes:
      line: the instruction.
      computation: name of the computation that it is in.
      times: how often a step runs it.
      fused: whether it is part of a fusion, which is one kernel.
    """

    line: Instruction
    computation: str
    times: int
    fused: bool


@dataclass(frozen=True)
class Program:
    """An HLO module.

    Attributes:
      computations: the instructions of each computation, by the names of both, in order.
      entry: name of the computation that runs first.
      devices: number of devices that it runs on.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parses the text of `compiled.as_text()`.

        Raises:
          ValueError: if the text is not an HLO module.
        """
        computations: dict[str, dict[str, Instruction]] = {}
        entry = current = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = head.group(2)
                computations[current] = {}
                entry = current if head.group(1) else entry
            elif current and (found := Instruction.parse(line)):
                computations[current][found.name] = found
        if not entry:
            raise ValueError("not the text of a compiled HLO module: it has no ENTRY computation")
        header = text.partition("\n")[0]
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
        return cls(computations, entry, math.prod(map(int, counts)))

    def runs(self, cost: Callable[[Run], int] | None = None) -> Iterator[Run]:
        """Yields every instruction that a step runs, with how often.

        An instruction in the body of a loop runs as often as the loop does, where that is known:
        the compiler says it, or the loop counts from 0 up to a constant. Otherwise it counts once.

        Args:
          cost: what is counted of an instruction, all its times together: of a conditional only the
            branch with the largest sum is run. Without it all branches are listed.
        """

        def walk(name: str, times: int, fused: bool) -> Iterator[Run]:
            for line in self.computations[name].values():
                yield Run(line, name, times, fused)
                inner = times * (self._trips(line) if line.opcode == "while" else 1)
                parts = [list(walk(each, inner, line.opcode == "fusion")) for each in line.calls]
                if line.opcode == "conditional" and cost is not None:
                    parts = [max(parts, key=lambda part: sum(map(cost, part)), default=[])]
                yield from itertools.chain(*parts)

        yield from walk(self.entry, 1, False)

    def _trips(self, line: Instruction) -> int:
        """Returns how often a loop runs, or 1 where that is not known."""
        if told := line.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(told)
        lines = self.computations[line.attribute(rf"condition={NAME}")].values()
        inner = [
            each for one in lines for call in one.calls for each in self.computations[call].values()
        ]
        compared = [each for each in (*lines, *inner) if each.opcode == "compare"]
        bounds = [each for each in lines if each.opcode == "constant" and each.type[:1] in "su"]
        if len(compared) == len(bounds) == 1 and "direction=LT" in compared[0].attributes:
            return int(bounds[0].attribute(r"^\((-?\d+)\)") or 1)
        return 1


def array_bytes(type_: str) -> int:
    """Returns the bytes of an array type `bf16[8,64]{1,0}`, or of all arrays of a tuple type."""
    return sum(_bits(name) * size // 8 for name, size in _arrays(type_))


def array_size(type_: str) -> int:
    """Returns the numbers that an array type holds, or all arrays of a tuple type."""
    return sum(size for _, size in _arrays(type_))


def _arrays(type_: str) -> list[tuple[str, int]]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_)
    return [(name, math.prod(map(int, shape.split(",") if shape else ()))) for name, shape in found]


def _bits(name: str) -> int:
    """Returns the bits of a number of a type such as `bf16`, `pred`, `f8e4m3fn` or `u32`."""
    found = re.match(r"[a-z]+(\d+)", name)
    return int(found.group(1)) if found else 8 * (name == "pred")


def _parenthesis(text: str) -> tuple[str, str]:
    """Splits a text into the parenthesis that it begins with and what follows it."""
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:end], text[end:]
    return text, ""
