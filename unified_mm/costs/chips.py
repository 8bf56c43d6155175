"""Accelerators that this machine need not have: their peaks, and devices to compile for.

A TPU's compiler runs on any machine that has `libtpu`; it needs a topology, not a chip.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Chip:
    """The peaks of one chip.

    Attributes:
      memory: bytes of its memory.
      flops: bfloat16 operations per second of its matrix units.
      memory_bandwidth: bytes per second from and to its memory.
      link_bandwidth: bytes per second that it sends over all its links to other chips together.
      dimensions: dimensions of the torus that the chips form.
      largest: number of chips in the largest slice.
    """

    memory: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    dimensions: int
    largest: int


# https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p and .../v6e: peak compute, HBM capacity and
# bandwidth, interconnect bandwidth of a chip (bits there). v4's links: Jouppi et al. 2023, table 4.
CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1200e9, 300e9, 3, 4096),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9, 2, 256),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9, 3, 6144),
    "v6e": Chip(32 * 2**30, 918e12, 1600e9, 400e9, 2, 256),
}
FORM = "NAME:SIZES such as v5e:4x4 or v5p:8x8x16 (there are {names}), or cpu:NUMBER"
# So that libtpu asks no metadata server where it runs, warns of nothing that it does not find here,
# and lets several such compilations run beside each other.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any that it knows; the topology is what counts
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def target(topology: str) -> tuple[list[Any], Chip | None]:
    """Returns devices to compile for, and the peaks of each (None where they are not known).

    To be called before jax has looked for devices; from then on jax sees only this machine's CPU.

    Args:
      topology: name and sizes such as 'v5e:4x4', or 'cpu:8' for 8 devices of this machine's CPU.

    Raises:
      ValueError: if there is no such topology, or libtpu is not installed.
    """
    name, _, sizes = topology.partition(":")
    if name == "cpu" and sizes.isdecimal():
        return cpu_devices(int(sizes)), None
    form = FORM.format(names=", ".join(CHIPS))
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or name not in CHIPS:
        raise ValueError(f"--topology={topology}: must be {form}")
    chip = CHIPS[name]
    shape = [int(size) for size in sizes.split("x")]
    if len(shape) != chip.dimensions or not 1 <= math.prod(shape) <= chip.largest:
        raise ValueError(
            f"--topology={topology}: {name} makes tori of {chip.dimensions} dimensions and at most "
            f"{chip.largest} chips"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology} needs the TPU's compiler, libtpu: pip install -e '.[tpu]'"
        )
    jax.config.update("jax_platforms", "cpu")
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    options = {"chip_config_name": "megacore"} if name == "v4" else {}  # one device a chip
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices), chip
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}") from error


def cpu_devices(count: int) -> list[Any]:
    """Returns `count` devices of this machine's CPU.

    Raises:
      ValueError: if `count` is below 1, or jax has already made fewer devices.
    """
    if count < 1:
        raise ValueError(f"--topology=cpu:{count}: at least one device is needed")
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # where jax has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices()
    if count > len(there):
        raise ValueError(f"--topology=cpu:{count}: this process has made {len(there)} already")
    return there[:count]
