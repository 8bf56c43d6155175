"""The peaks of NVIDIA's cards by their specification: dense, without sparsity."""

from __future__ import annotations

from typing import NamedTuple


class Peaks(NamedTuple):
    """The peaks of a card.

    Attributes:
      flops: bfloat16 operations a second of its tensor cores.
      memory_bandwidth: bytes a second from and to its memory.
    """

    flops: float
    memory_bandwidth: float


# NVIDIA's data sheets of the SXM cards; tensor figures there are with sparsity, twice as high.
CARDS = {
    "B200": Peaks(2250e12, 8.0e12),
    "H200": Peaks(989.4e12, 4.8e12),
    "H100": Peaks(989.4e12, 3.35e12),
    "A100": Peaks(312e12, 2.039e12),
}


def peaks_of(kind: str) -> Peaks | None:
    """Returns the peaks of a device by its kind, such as 'NVIDIA H200'; None for another."""
    return next((peaks for name, peaks in CARDS.items() if name in kind), None)
