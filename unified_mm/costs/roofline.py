"""The least time that a step can take on a chip, by the roofline model (Williams et al. 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unified_mm.costs.chips import Chip, Gpu
from unified_mm.costs.collectives import Collective


@dataclass(frozen=True)
class Roofline:
    """The seconds that each part of a chip needs for its share of a step, at its peak.

    Attributes:
      compute: FLOPs of the chip / its bfloat16 FLOP/s.
      memory: bytes read and written / bandwidth of its memory.
      collectives: bytes sent / bandwidth of what they are sent over.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def step(self) -> float:
        """The least seconds of a step where all three overlap: the largest one."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        """The least seconds where only compute and memory overlap, as they do in a kernel."""
        return max(self.compute, self.memory) + self.collectives

    @property
    def bound(self) -> str:
        """The name of the part that takes longest."""
        parts = {name: getattr(self, name) for name in ("compute", "memory", "collectives")}
        return max(parts, key=parts.__getitem__)

    @property
    def scaling_efficiency(self) -> float:
        """The speed of a chip relative to one that does the same share without collectives.

        It is for collectives that overlap with the rest; `serial_scaling_efficiency` is for those
        that do not.
        """
        return max(self.compute, self.memory) / self.step

    @property
    def serial_scaling_efficiency(self) -> float:
        return max(self.compute, self.memory) / self.serial


def roofline(chip: Chip, flops: float, traffic: int, sending: float) -> Roofline:
    """Returns the roofline of a step, from what one chip has to do.

    Args:
      chip: the chip.
      flops: operations of the chip, including recomputation.
      traffic: bytes read from and written to its memory.
      sending: seconds of its collectives; see `sending_seconds`.
    """
    return Roofline(
        compute=flops / chip.flops,
        memory=traffic / chip.memory_bandwidth,
        collectives=sending,
    )


def sending_seconds(chip: Chip, collectives: Sequence[Collective]) -> float:
    """Returns the seconds in which a chip can send what collectives have it send.

    All its links are busy. Among GPUs of several hosts each array is first exchanged within a host,
    and then each GPU sends its share to the other hosts, while the next array is exchanged.
    """
    return sum(_seconds(chip, each) for each in collectives)


def _seconds(chip: Chip, collective: Collective) -> float:
    within = collective.sent / chip.link_bandwidth
    if not isinstance(chip, Gpu):
        return within
    hosts = len({member // chip.host for member in collective.members})
    if hosts < 2:
        return within
    share = hosts / len(collective.members)
    between = replace(collective, group_size=hosts).sent * share
    return max(within, between / chip.network_bandwidth)


def utilisation(chip: Chip, chips: int, flops: int, seconds: float) -> float:
    """Returns the MFU, the share of all chips' peak that model FLOPs use (Chowdhery et al. 2022).

    Args:
      chip: kind of the chips.
      chips: number of chips.
      flops: operations of a step on all chips, without recomputation.
      seconds: seconds that the step takes.
    """
    return flops / (chips * chip.flops * seconds)
