"""The communication between devices in a compiled step, read from its optimised HLO.

    compiled = step.lower(state, batch).compile()
    collectives_of(compiled.as_text())

The program is that of one device, so all bytes are per device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from unified_mm.costs.hlo import Instruction, Program, Run, array_bytes

TOTALS = ("count", "asynchronous", "bytes", "sent")
KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: bytes of the whole array on one device, each time it runs: the output of an all-gather,
        the input of any other.
      count: how often a step runs it.
      group_size: number of devices that take part together.
      members: numbers of these devices, where the program lists them; of devices that send to each
        other in pairs, the two that are farthest apart.
      asynchronous: whether the program goes on while it runs.
      source: the operation of the traced program that it comes from, as the compiler names it.
    """

    kind: str
    bytes: int
    count: int
    group_size: int
    source: str = field(default="", compare=False)
    members: tuple[int, ...] = field(default=(), compare=False)
    asynchronous: bool = field(default=False, compare=False)

    @property
    def sent(self) -> int:
        """The bytes that each device sends in a step, by the usual ring algorithms.

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
    """Returns the collectives of a compiled program, each instruction once, in program order.

    Of a conditional they are those of the branch that sends the most. `costs.hlo.Program.runs` says
    how often those in loops are counted.

    Args:
      compiled_text: text of `compiled.as_text()`, after the optimisation passes.

    Raises:
      ValueError: if the text is not an HLO module.
    """
    return collectives_in(Program.parse(compiled_text))


def collectives_in(program: Program) -> list[Collective]:
    """Returns the collectives of a parsed program, as `collectives_of` does."""

    def sent(run: Run) -> int:
        return _collective(run, program).sent if kind_of(run.line) else 0

    begun = collectives_once(program.runs(sent))
    return [_collective(run, program) for run in begun if kind_of(run.line)]


def collectives_once(runs: Iterable[Run]) -> Iterator[Run]:
    """Yields what is run, of each collective only the instruction that begins it.

    A TPU's compiler spreads one collective over several fusions with the same channel, and runs
    other instructions and loops between them. The first of these fusions begins the collective.
    """
    begun = set()
    for run in runs:
        if kind_of(run.line) and "async_collective_fusion" in run.line.attributes:
            channel = run.line.attribute(r"channel_id=(\d+)")
            if channel in begun:
                continue
            begun.add(channel)
        yield run


def kind_of(line: Instruction) -> str | None:
    """Returns the kind of the collective that an instruction begins, or None."""
    name = line.opcode.removesuffix("-start")
    return name if name in KINDS else None


def totals_by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """Returns for each kind how many run in a step, and how many of these beside other work.

    And the bytes of their arrays, and those sent. All are per device.
    """
    totals: dict[str, dict[str, int]] = {}
    for each in collectives:
        of_kind = totals.setdefault(each.kind, dict.fromkeys(TOTALS, 0))
        of_kind["count"] += each.count
        of_kind["asynchronous"] += each.count * each.asynchronous
        of_kind["bytes"] += each.count * each.bytes
        of_kind["sent"] += each.sent
    return totals


def _collective(run: Run, program: Program) -> Collective:
    line = run.line
    kind = kind_of(line) or ""
    size = _group_size(line, program.devices)
    around = program.computations[run.computation]
    total = sum(array_bytes(around[name].type) for name in line.operands)
    if kind == "all-gather":
        total *= size
    if kind == "all-reduce" and run.computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a TPU's: fused with the slice that each device keeps
    source = line.attribute(r'op_name="([^"]*)"')
    return Collective(
        kind, total, run.times, size, source, _members(line, size), _is_asynchronous(run)
    )


def _group_size(line: Instruction, devices: int) -> int:
    """Returns the number of devices of the first group, in any notation of groups."""
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
    return devices


def _is_asynchronous(run: Run) -> bool:
    """Returns whether a collective is one that is begun in one place and awaited in another."""
    begun = (
        run.line.opcode.endswith("-start")
        or run.computation.startswith("async_computation")
        or "async_collective_fusion" in run.line.attributes
    )
    return begun and '"is_sync":true' not in run.line.attributes


def _members(line: Instruction, size: int) -> tuple[int, ...]:
    """Returns the devices of the first group; the first `size` where it is not said which."""
    if pairs := line.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
        return max(found, key=lambda pair: abs(pair[0] - pair[1]))
    if listed := line.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return tuple(map(int, listed.split(",")))
    if counted := line.attribute(r"replica_groups=\[\d+,\d+\]<=(\[[\d,]+\](?:T\([\d,]+\))?)"):
        return tuple(_numbered(counted)[:size].tolist())
    if axes := line.attribute(r"replica_groups=mesh\[([^\]]*)\]"):
        sizes = {name: int(count) for name, count in re.findall(r"'(\w+)'=(\d+)", axes)}
        order = line.attribute(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)")
        numbers = _numbered(order or f"[{math.prod(sizes.values())}]")
        named = line.attribute(r"replica_groups=mesh\[[^{]*\{([^}]*)\}")
        places = np.zeros(1, int)
        for axis, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named):
            after = math.prod(list(sizes.values())[list(sizes).index(axis) + 1 :])
            count = int(part or sizes[axis])
            step = after * sizes[axis] // (int(before or 1) * count)
            places = (places[:, None] + step * np.arange(count)).reshape(-1)
        return tuple(numbers[places].tolist())
    return tuple(range(size))


def _numbered(tiling: str) -> np.ndarray:
    """Returns the devices in an order such as `[2,4]T(1,0)`: counted in 2 x 4, then turned."""
    shape, _, turned = tiling.partition("T")
    sizes, axes = ([int(each) for each in re.findall(r"\d+", part)] for part in (shape, turned))
    axes = axes or list(range(len(sizes)))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)


def _ring(pairs: str) -> int:
    """Returns the number of devices in the chain that the first of pairs `{0,1},{1,2}` is in."""
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
