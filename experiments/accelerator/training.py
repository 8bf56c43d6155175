"""The machine itself, `large` at its best, and the ladder of `base`."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.accelerator.scale import Setting, config_of, largest_batch
from experiments.accelerator.schedule import Results, Row, Rows
from experiments.accelerator.trainer import Trainer, device_memory
from unified_mm.benchmarks.timing import (
    fused_attention,
    matmul_peak,
    memory_bandwidth,
    provenance,
)
from unified_mm.costs.peaks import chip_of
from unified_mm.training.ahead import DoesNotFit

APART = 0.05  # of the device's memory, lost between what is held
# By worth: the best, the plainest, then a step each.
LADDER = (
    ("bfloat16", "fused", "none"),
    ("float32", "xla", "none"),
    ("bfloat16", "xla", "none"),
    ("bfloat16", "fused", "full"),
    ("bfloat16", "xla", "full"),
    ("float32", "xla", "full"),
)


def machine(setting: Setting) -> Rows:
    """Returns the rows about the machine itself."""
    del setting  # the same at any scale

    def specified() -> Row:
        known = chip_of(jax.devices()[0].device_kind)
        return {
            "dense_specification_flops": known[1].flops if known else None,
            "specification_bandwidth": known[1].memory_bandwidth if known else None,
            "memory_bytes": device_memory(0),
        }

    return {
        "about": provenance,
        "specification": specified,
        "products": lambda: {"measured_flops": round(matmul_peak(jnp.bfloat16))},
        "memory": lambda: {"measured_bandwidth": round(memory_bandwidth())},
    }


def peaks_found(results: Results) -> dict[str, Any]:
    """Returns the peaks of the machine by name, those that are known."""
    rows = results.rows("machine")
    found = [rows.get(name, {}) for name in ("specification", "products", "memory")]
    return {name: value for row in found for name, value in row.items() if value is not None}


def large(setting: Setting) -> Rows:
    """Returns the rows of training `large`: what it holds, then at the largest batch."""
    scale, results = setting.scale, setting.results

    def trainer(batch: int) -> Trainer:
        changes = {**scale.large, "train.batch_size": batch}
        return Trainer(config_of("large", changes, dtype="bfloat16", attention=fused_attention()))

    def memory() -> Row:
        small, there = trainer(scale.first_batch), device_memory(scale.memory)
        sizes = {
            "batch": small.batch_size,
            "held_bytes": small.held,
            "state_bytes": small.of_state,
            "memory_bytes": there,
        }
        return {
            **sizes,
            "compile_seconds": round(small.compile_seconds, 1),
            "largest_batch": largest_batch(sizes, there * (1 - APART), scale),
        }

    def train() -> Row:
        batch = results.rows("large")["memory"]["largest_batch"]
        refused: list[str] = []
        while True:
            try:
                found = trainer(batch).measured(peaks_found(results), scale.steps, scale.turns)
                return {**found, "refused": refused}
            except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
                out_of_memory = isinstance(error, DoesNotFit) or "RESOURCE_EXHAUSTED" in str(error)
                if not out_of_memory or batch < 2 * scale.multiple:
                    raise
                refused.append(f"{batch}: {str(error).splitlines()[0]}")
            gc.collect()  # of the attempt that its traceback held
            batch = batch * 3 // 4 // scale.multiple * scale.multiple

    return {"memory": memory, "train": train}


def ladder(setting: Setting) -> Rows:
    """Returns a row for each way to train `base`, all with one batch size."""
    scale, results = setting.scale, setting.results

    def measure(dtype: str, attention: str, remat: str) -> Row:
        backend = fused_attention() if attention == "fused" else attention
        changes = {**scale.base, "train.batch_size": scale.ladder_batch}
        config = config_of("base", changes, dtype=dtype, attention=backend, remat=remat)
        return Trainer(config).measured(peaks_found(results), scale.steps, scale.turns)

    return {
        f"{dtype}, {attention}, remat {remat}": partial(measure, dtype, attention, remat)
        for dtype, attention, remat in LADDER
    }
