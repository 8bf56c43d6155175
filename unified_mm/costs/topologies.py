"""Devices to compile for that this machine need not have.

A compiler runs on any machine that has it, a TPU's in `libtpu`, a GPU's in jax's plugin for CUDA;
it needs a topology, not a chip.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import replace
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from unified_mm.costs.chips import GPUS, TPUS, Chip, Gpu, Tpu
from unified_mm.costs.memory_share import memory_share

FORM = (
    "NAME:SIZES such as v5e:4x4 or v5p:8x8x16 (there are {tpus}), NAME:GPUS or NAME:HOSTSxGPUS "
    "such as h100:8 or h100:4x8 (there are {gpus}), or cpu:NUMBER"
)
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
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Without a GPU nothing can be tried out, and for some products XLA then finds no tiles of its own
# kernels ("Couldn't find output tile sizes"): cuBLAS computes them all.
FLAGS = "--xla_gpu_enable_triton_gemm=false"


def target(topology: str) -> tuple[list[Any], Chip | None]:
    """Returns devices to compile for, and the peaks of each (None where they are not known).

    To be called before jax has looked for devices; from then on jax sees only this machine's CPU.
    The memory of a GPU is what jax takes of it.

    Args:
      topology: name and sizes such as 'v5e:4x4', 'h100:8' (GPUs of a host) or 'h100:4x8' (hosts and
        GPUs of each), or 'cpu:8' for 8 devices of this machine's CPU.

    Raises:
      ValueError: if there is no such topology, its compiler is not installed, or the environment
        says no share of a GPU's memory.
    """
    name, _, sizes = topology.partition(":")
    if name == "cpu" and sizes.isdecimal():
        return cpu_devices(int(sizes)), None
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or name not in (*TPUS, *GPUS):
        form = FORM.format(tpus=", ".join(TPUS), gpus=", ".join(GPUS))
        raise ValueError(f"--topology={topology}: must be {form}")
    shape = [int(size) for size in sizes.split("x")]
    make = tpu_devices if name in TPUS else gpu_devices
    share = memory_share(os.environ) if name in GPUS else 1
    try:
        devices, chip = make(name, shape)
    except ValueError as error:
        raise ValueError(f"--topology={topology}{error}") from error
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
    return devices, replace(chip, memory=int(chip.memory * share))


def tpu_devices(name: str, shape: list[int]) -> tuple[list[Any], Tpu]:
    """Returns the chips of a torus, and the peaks of each.

    Raises:
      ValueError: if there is no such torus, or libtpu is not installed.
    """
    chip = TPUS[name]
    if len(shape) != chip.dimensions or not 1 <= math.prod(shape) <= chip.largest:
        raise ValueError(
            f": {name} makes tori of {chip.dimensions} dimensions and at most {chip.largest} chips"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(" needs the TPU's compiler, libtpu: pip install 'unified_mm[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}  # one device
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]  # a host has four otherwise
    sizes = "x".join(map(str, shape))
    return list(topologies.get_topology_desc(f"{name}:{sizes}", "tpu", **options).devices), chip


def gpu_devices(name: str, shape: list[int]) -> tuple[list[Any], Gpu]:
    """Returns the GPUs of one or several hosts, and the peaks of each.

    Raises:
      ValueError: if there is no such topology, or jax's plugin for CUDA is not installed.
    """
    gpu = GPUS[name]
    hosts, count = (1, *shape)[-2:]
    if len(shape) > 2 or not 1 <= count <= 8 or not hosts:
        raise ValueError(f": a host has 1 to 8 GPUs, so it is {name}:GPUS or {name}:HOSTSxGPUS")
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        raise ValueError(
            " needs the GPU's compiler, jax's plugin for CUDA, and no GPU: "
            "pip install 'unified_mm[cuda12]'"
        )
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks for a driver
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"  # the last one wins
    # jax asks this machine's GPU what cuDNN can do there; it is told of the one compiled for.
    fused_attention_stablehlo.check_compute_capability = lambda least: (
        gpu.capability >= tuple(map(int, least.split(".")))
    )
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=gpu.description, topology=f"1x{hosts}x{count}"
    ).devices
    return list(devices), replace(gpu, host=count)


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
