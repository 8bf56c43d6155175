"""The least time that a step can take on a chip (Williams et al. 2009), by what each part needs."""

from __future__ import annotations

from dataclasses import dataclass

from unified_mm.costs.chips import Chip


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a chip needs for its share of a step, at its peak.

        compute     = FLOPs of the chip / its bfloat16 FLOP/s
        memory      = bytes read and written / bandwidth of its memory
        collectives = bytes sent / bandwidth of all its links

    Attributes:
      compute, memory, collectives: as above.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def step(self) -> float:
        """Where all three overlap: the largest one."""
        return max(self.compute, self.memory, self.collectives)

    @property
    def serial(self) -> float:
        """Where compute and memory overlap, as they do in a kernel, and collectives wait."""
        return max(self.compute, self.memory) + self.collectives

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        parts = {name: getattr(self, name) for name in ("compute", "memory", "collectives")}
        return max(parts, key=parts.__getitem__)

    @property
    def scaling_efficiency(self) -> float:
        """The speed of a chip beside that of one that did the same share without collectives.

        Where they overlap with the rest; where they wait it is `serial_scaling_efficiency`.
        """
        return max(self.compute, self.memory) / self.step

    @property
    def serial_scaling_efficiency(self) -> float:
        return max(self.compute, self.memory) / self.serial


def roofline(chip: Chip, flops: float, traffic: int, sent: int) -> Roofline:
    """Of a step, by what one chip has to do.

    Args:
      chip: that does it.
      flops: operations, what is computed again included.
      traffic: bytes from and to its memory.
      sent: bytes to other chips.
    """
    return Roofline(
        compute=flops / chip.flops,
        memory=traffic / chip.memory_bandwidth,
        collectives=sent / chip.link_bandwidth,
    )


def utilisation(chip: Chip, chips: int, flops: int, seconds: float) -> float:
    """MFU: what share of all chips' peak the model's own operations are (Chowdhery et al. 2022).

    Args:
      chip, chips: the kind, and how many.
      flops: of a step on all of them, nothing that is computed again.
      seconds: that the step takes.
    """
    return flops / (chips * chip.flops * seconds)
