"""Decoding of `large`, whose weights are read once a token: against the time that this takes."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.accelerator.scale import Setting, config_of
from experiments.accelerator.schedule import Row, Rows
from experiments.accelerator.training import peaks_found
from unified_mm.benchmarks.generation import Way, costs
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.inference.quantization import quantized
from unified_mm.parallel.sharding import without_names
from unified_mm.task import build_task
from unified_mm.training.sizes import stand_in_for


def decoding(setting: Setting) -> Rows:
    """Returns a row for each kind of numbers and batch."""

    @functools.cache
    def model(numbers: str) -> LoadedModel:
        if numbers == "bfloat16":
            return drawn_model(setting).with_options(dtype=jnp.bfloat16, attention="auto")
        small = quantized(drawn_model(setting).with_options(attention="auto"))
        return small.with_options(dtype=jnp.bfloat16, cache="int8")

    def measure(numbers: str, batch: int) -> Row:
        scale, peaks = setting.scale, peaks_found(setting.results)
        found = costs(Way(numbers, model(numbers), True), batch, scale.tokens, scale.repeats)
        read = found["decode_step_reads_bytes"]
        row: dict[str, Any] = {"batch": batch, **found}
        for name in ("measured_bandwidth", "specification_bandwidth"):
            if bandwidth := peaks.get(name):
                at_most = batch * bandwidth / read
                share = found["tokens_per_second"] / at_most
                row[f"share_of_floor_by_{name}"] = round(share, 4)
        return row

    return {
        f"{numbers}, batch {batch}": partial(measure, numbers, batch)
        for numbers in ("bfloat16", "int8")
        for batch in (1, setting.scale.batch)
    }


def drawn_model(setting: Setting) -> LoadedModel:
    """Returns `large` with random weights, as a run of it would be loaded."""
    config = config_of("large", setting.scale.large)
    task = build_task(config, stand_in_for(config))
    params = without_names(jax.jit(task.init)(jax.random.key(0)))
    return LoadedModel(task, params, one_device_mesh(), config, 0)
