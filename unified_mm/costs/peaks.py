"""The peak of the devices that a run has, by the name that jax gives them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unified_mm.costs.chips import CHIPS, Chip

# By jax's names, which are not those of a topology.
TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
SLOWER = ("PCIE", "NVL", "MIG")  # boards, and parts, with the chip's name but not with its peak
SMALLER = replace(CHIPS["a100"], memory=40 * 2**30, memory_bandwidth=1555e9)  # of 40 GB


def chip_of(kind: str) -> tuple[str, Chip] | None:
    """Returns name and peaks of a kind of device, None where they are not known."""
    card = re.match(r"NVIDIA ([A-Z]\d+)\b", kind)
    name = TPUS.get(kind) or (card[1].lower() if card else "")
    if name not in CHIPS or any(word in kind.upper() for word in SLOWER):
        return None
    if name == "a100" and "80GB" not in kind:
        return (name, SMALLER) if "40GB" in kind else None
    return name, CHIPS[name]


def peak_of(devices: Sequence[Any], given: float = 0.0) -> tuple[float, str] | None:
    """Returns the FLOP/s of devices together at their peak, and which peak that is, in words.

    It is None where it is not known.

    Args:
      devices: of one kind.
      given: the FLOP/s of each, for a kind that is not known, or as it was measured; 0 for none.
    """
    if given:
        kind = devices[0].device_kind
        said = f"{given / 1e12:,.3g} TFLOP/s, logging.peak_flops of each {kind}"
        return len(devices) * given, said
    found = chip_of(devices[0].device_kind)
    if found is None:
        return None
    name, chip = found
    said = f"{chip.flops / 1e12:,.0f} TFLOP/s, the dense peak in bfloat16 of each {name}"
    return len(devices) * chip.flops, said
