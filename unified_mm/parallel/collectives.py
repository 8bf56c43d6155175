"""What devices say to each other in a compiled step, read from its optimised HLO.

    compiled = step.lower(state, batch).compile()
    collectives_of(compiled.as_text())

A program is that of one device, so all bytes are of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BITS = {"pred": 8, "token": 0, "opaque": 0}  # of types whose name does not end in their bits


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array on one device, each time it runs: what comes out of an all-gather,
        what goes into any other.
      count: how often a step runs it.
      group_size: devices that take part together.
      source: where in the traced program it comes from, as the compiler tells it.
    """

    kind: str
    bytes: int
    count: int
    group_size: int
    source: str = field(default="", compare=False)

    @property
    def sent(self) -> int:
        """Bytes that each device sends in a step, by the usual ring algorithms.

        For n devices an all-gather, a reduce-scatter or an all-to-all sends (n - 1) / n of the
        array, an all-reduce twice that, anything else all of it (Thakur et al. 2005, section 4).
        """
        ring = (self.group_size - 1) / self.group_size
        share = {
            "all-gather": ring,
            "reduce-scatter": ring,
            "all-to-all": ring,
            "ragged-all-to-all": ring,
            "all-reduce": 2 * ring,
        }
        return round(self.count * self.bytes * share.get(self.kind, 1.0))


def collectives_of(compiled_text: str) -> list[Collective]:
    """The collectives of a compiled program, each instruction once, in the program's order.

    Those in the body of a loop count as often as the loop runs, where that is known: told by the
    compiler, or a bound that the loop counts up to from 0. Otherwise they count once, and so do
    both sides of a condition.

    Args:
      compiled_text: `compiled.as_text()`, after the optimisation passes.

    Raises:
      ValueError: a text that is no HLO module.
    """
    program = _Program.parse(compiled_text)
    return list(program.walk(program.entry, 1, None))


def totals_by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many run in a step, the bytes of their arrays, and the bytes that are sent.

    All three are of one device.
    """
    totals: dict[str, dict[str, int]] = {}
    for each in collectives:
        of_kind = totals.setdefault(each.kind, {"count": 0, "bytes": 0, "sent": 0})
        of_kind["count"] += each.count
        of_kind["bytes"] += each.count * each.bytes
        of_kind["sent"] += each.sent
    return totals


@dataclass(frozen=True)
class _Instruction:
    """One line of HLO: `%name = type opcode(%operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def kind(self) -> str | None:
        """Of the collective that begins here, if any does."""
        name = self.opcode.removesuffix("-start")
        return name if name in KINDS else None

    @property
    def calls(self) -> list[str]:
        """Computations that it runs, a loop's body among them."""
        if self.opcode in ("async-update", "async-done"):  # their start has named it
            return []
        one = re.findall(r"\b(?:body|calls|to_apply|\w+_computation)=%([\w.\-]+)", self.attributes)
        several = re.findall(r"\b\w+_computations=\{([^}]*)\}", self.attributes)
        return one + [name for names in several for name in re.findall(r"%([\w.\-]+)", names)]

    def attribute(self, pattern: str) -> str:
        """What a pattern's group matches in the attributes, '' where it does not."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


@dataclass(frozen=True)
class _Program:
    """An HLO module: its computations by name, the first one to run, and how many devices."""

    computations: Mapping[str, tuple[_Instruction, ...]]
    entry: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> _Program:
        computations: dict[str, list[_Instruction]] = {}
        entry = current = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = head.group(2)
                computations[current] = []
                entry = current if head.group(1) else entry
            elif current and (found := _instruction(line)):
                computations[current].append(found)
        if not entry:
            raise ValueError("not the text of a compiled HLO module: it has no ENTRY computation")
        header = text.partition("\n")[0]
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
        return cls(
            {name: tuple(lines) for name, lines in computations.items()},
            entry,
            math.prod(map(int, counts)),
        )

    def walk(self, name: str, times: int, pieces: set[str] | None) -> Iterator[Collective]:
        """The collectives of a computation that runs `times` times.

        A TPU's compiler spreads one collective over several fusions, between which others run; it
        bears the same channel in each. `pieces` are the channels that were met so: a computation
        that is no fusion's begins a new set.
        """
        fused, pieces = pieces is not None, set() if pieces is None else pieces
        lines = {line.name: line for line in self.computations.get(name, ())}
        for line in lines.values():
            if line.kind:
                channel = line.attribute(r"channel_id=(\d+)") or line.name
                if not (fused and channel in pieces):
                    yield self._collective(line, name, lines, times)
                if fused:
                    pieces.add(channel)
            runs = times * (self._trips(line) if line.opcode == "while" else 1)
            for called in line.calls:
                inner = pieces if line.opcode == "fusion" else None
                yield from self.walk(called, runs, inner)

    def _collective(
        self, line: _Instruction, name: str, lines: Mapping[str, _Instruction], times: int
    ) -> Collective:
        kind = line.kind or ""
        size = self._group_size(line)
        total = sum(_bytes(lines[operand].type) for operand in line.operands if operand in lines)
        if kind == "all-gather":
            total *= size
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU's: fused with the slice that each device keeps
        return Collective(kind, total, times, size, line.attribute(r'op_name="([^"]*)"'))

    def _trips(self, line: _Instruction) -> int:
        """How often a loop runs; 1 where nobody knows."""
        if told := line.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(told)
        lines = self.computations.get(line.attribute(r"condition=%([\w.\-]+)"), ())
        inner = [each for one in lines for call in one.calls for each in self.computations[call]]
        compared = [each for each in (*lines, *inner) if each.opcode == "compare"]
        bounds = [each for each in lines if each.opcode == "constant" and each.type[:1] in "su"]
        if len(compared) == len(bounds) == 1 and "direction=LT" in compared[0].attributes:
            return int(bounds[0].attribute(r"^\((-?\d+)\)") or 1)
        return 1

    def _group_size(self, line: _Instruction) -> int:
        """Devices of the first group, in any of the ways that groups are written."""
        if pairs := line.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
            return _ring(pairs)
        if listed := line.attribute(r"replica_groups=\{\{([\d,]+)\}"):
            return listed.count(",") + 1
        if counted := line.attribute(r"replica_groups=\[\d+,(\d+)\]"):
            return int(counted)
        if axes := line.attribute(r"replica_groups=mesh\[([^\]]*)\]"):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
            named = line.attribute(r"replica_groups=mesh\[[^{]*\{([^}]*)\}")
            used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named)
            return math.prod(int(part or sizes[axis]) for axis, part in used)
        return self.devices


def _instruction(line: str) -> _Instruction | None:
    """A line's instruction; None for one that holds none."""
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
    if not found:
        return None
    name, type_, opcode = found.groups()
    operands, attributes = _parenthesis(line[found.end() - 1 :])
    if opcode == "constant":
        attributes = operands  # its value
    return _Instruction(
        name, type_, opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), attributes
    )


def _parenthesis(text: str) -> tuple[str, str]:
    """A parenthesis that text begins with, and what follows it."""
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:end], text[end:]
    return text, ""


def _bytes(type_: str) -> int:
    """Of an array `bf16[8,64]{1,0}` or of a tuple of such."""
    total = 0
    for name, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_):
        found = re.match(r"[a-z]+(\d+)", name)
        bits = BITS[name] if name in BITS else int(found.group(1)) if found else 0
        total += bits * math.prod(int(size) for size in shape.split(",") if size) // 8
    return total


def _ring(pairs: str) -> int:
    """How many devices the chain joins that the first pair of `{0,1},{1,2}` is part of."""
    found = re.findall(r"\{(\d+),(\d+)\}", pairs)
    following = dict(found)
    before = {target: source for source, target in found}
    joined = {found[0][0]}
    for step in (following, before):
        device = step.get(found[0][0])
        while device is not None and device not in joined:
            joined.add(device)
            device = step.get(device)
    return len(joined)
