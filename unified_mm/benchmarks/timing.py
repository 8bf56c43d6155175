"""Measurements that the benchmarks share: seconds, bytes and rates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.nn.attention.backends import KERNEL_OF
from unified_mm.parallel.mesh import platform
from unified_mm.runs.environment import device_name, revision, versions


def fused_attention() -> str:
    """Returns the attention backend that never stores all scores on this device."""
    return KERNEL_OF.get(platform(), "chunked")


def times_of(function: Callable[[], Any], count: int) -> list[float]:
    """Returns the seconds that each of `count` calls takes until its results are ready."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return times


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the 50th and 95th percentiles of times in milliseconds, as `p50_ms` and `p95_ms`."""
    return {
        f"p{share}_ms": round(1e3 * float(np.percentile(seconds, share)), 3) for share in (50, 95)
    }


def held_bytes(compiled: Any) -> int:
    """Returns the bytes that a compiled program holds: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return int(total + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def allocated_bytes() -> dict[str, int]:
    """Returns the peak bytes of the device's allocator; empty where it does not report them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"allocator_peak_bytes": stats["peak_bytes_in_use"]} if stats else {}


def resident_bytes() -> int:
    """Returns the memory that this process holds now; 0 where the system does not tell it."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else 0


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes of arrays) in a tree."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def matmul_peak(dtype: Any, size: int = 2048) -> float:
    """Measures the FLOP/s of one large matrix product on one device, the best of several.

    Numbers are random: a GPU multiplies equal ones with less power, and so up to a tenth faster.
    """
    size = size if jax.default_backend() == "cpu" else 4 * size
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / min(times_of(lambda: product(x, x), 8))


def memory_bandwidth() -> float:
    """Measures the bytes a second that one device reads and writes in copying a large array.

    The best of several copies counts. Decoding at batch 1 reads every weight for each token, so
    this bounds its speed.
    """
    count = 2**26 if jax.default_backend() == "cpu" else 2**30
    x = jnp.zeros(count, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / min(times_of(lambda: copy(x), 6))


def provenance() -> dict[str, Any]:
    """Returns the device, versions, revision and date of a measurement."""
    return {
        "device": device_name(),
        "versions": versions(),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
