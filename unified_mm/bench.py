"""How fast this device trains and reads: `python -m unified_mm.bench` (`--config=configs/coco.py`).

MFU is the share of the device's measured matrix-product peak that the model's own products reach
(Chowdhery et al. 2022, appendix B): 3 x the forward products of a step, nothing that is recomputed.
One line of JSON comes last.

    python -m unified_mm.bench --sweep --output=sweep.json

measures attention layers of the recipe's shape instead: see `unified_mm.sweep`. The plot lies
beside the file, as .svg.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

from unified_mm.commands import exit_code, new_file, say
from unified_mm.config import Config
from unified_mm.models.options import TransformerOptions
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.recipes import parse_flags, resolve
from unified_mm.runs.folder import RunFolder, write_atomically, write_json
from unified_mm.sweep import draw, sweep
from unified_mm.training.environment import device_name, revision, versions
from unified_mm.training.flops import training_flops
from unified_mm.training.loop import phase_batches, phase_step
from unified_mm.training.setup import Setup, prepare

CONFIG = config_flags.DEFINE_config_file("config", "configs/coco.py", "The recipe to measure.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps to time, after two that warm up.", lower_bound=1)
SWEEP = flags.DEFINE_bool("sweep", False, "Attention by backend over length, compiling by depth.")
OUTPUT = flags.DEFINE_string("output", "", "sweep: a new JSON file for what was measured.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise SystemExit(f"error: not a flag: {' '.join(argv[1:])}")
    raise SystemExit(exit_code(swept if SWEEP.value else bench, interrupted="interrupted"))


def bench() -> int:
    """Measures and prints."""
    logging.set_verbosity(logging.WARNING)
    config = Config(resolve(CONFIG.value, flags.FLAGS["config"], print).to_dict())
    with tempfile.TemporaryDirectory() as folder:
        result = measure(prepare(config, RunFolder(folder), print), STEPS.value)
    for name, value in result.items():
        print(f"{name:<28}{value}")
    print(json.dumps(result))
    return 0


def swept() -> int:
    """Measures attention over length and compiling over depth, and prints.

    Raises:
      ValueError: `--output` is there, or cannot be written.
    """
    logging.set_verbosity(logging.WARNING)
    output, plot = sweep_files(OUTPUT.value)
    config = Config(resolve(CONFIG.value, flags.FLAGS["config"], say).to_dict())
    result = sweep(TransformerOptions.from_config(config.model), say)
    if output and plot:
        write_json(output, result)
        write_atomically(plot, draw(result).encode())
        say(f"wrote {output} and {plot}")
    say(json.dumps(result))
    return 0


def sweep_files(output: str) -> tuple[Path | None, Path | None]:
    """Where the sweep's numbers and its plot go; None for ''.

    Raises ValueError where either is there, cannot be written, or is no .json.
    """
    path = new_file(output)
    if path is None:
        return None, None
    if path.suffix != ".json":
        raise ValueError(f"--output={path}: must end in .json; the plot is beside it as .svg")
    return path, new_file(str(path.with_suffix(".svg")))


def measure(setup: Setup, steps: int) -> dict[str, Any]:
    """Speeds of one config on this device; rates are a second, sizes bytes."""
    batch_size = setup.phases[0].batch_size
    peak = matmul_peak(setup.task.model.options.dtype)
    loader = loader_rate(setup, steps)
    seconds, memory = step_seconds(setup, steps)
    flops = training_flops(setup.phases[0])
    return {
        "steps_per_second": round(1 / seconds, 3),
        "images_per_second": round(batch_size / seconds, 1),
        "loader_images_per_second": round(loader, 1),
        "model_flops_per_step": flops,
        "matmul_peak_flops": round(peak),
        "mfu": round(flops / seconds / peak / len(jax.devices()), 4),
        "compiled_step_bytes": memory,
        "batch_size": batch_size,
        "device": device_name(),
        "versions": versions(),
        "revision": revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


def matmul_peak(dtype: Any, size: int = 2048) -> float:
    """Operations a second of one large matrix product on one device, the best of several."""
    size = size if jax.default_backend() == "cpu" else 4 * size
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / min(_times(lambda: product(x, x), 8))


def loader_rate(setup: Setup, steps: int) -> float:
    """Images a second that the data pipeline delivers by itself."""
    batches = phase_batches(setup, setup.phases[0], 0)
    with closing(batches):  # type: ignore[type-var]
        for _ in islice(batches, 3):
            pass
        began = time.perf_counter()
        for _ in islice(batches, steps):
            pass
    return steps * setup.phases[0].batch_size / (time.perf_counter() - began)


def step_seconds(setup: Setup, steps: int) -> tuple[float, int]:
    """Median seconds of a training step whose batch is at hand, and the compiled step's memory."""
    with jax.set_mesh(setup.mesh), nn.logical_axis_rules(rule_items()):
        phase = setup.phases[0]
        state = phase.enter(setup.make_state())
        step = phase_step(setup, phase)
        with closing(phase_batches(setup, phase, 0)) as batches:  # type: ignore[type-var]
            ready = cycle([to_global(next(batches), setup.mesh) for _ in range(2)])
        compiled = step.lower(state, next(ready)).compile()  # type: ignore[attr-defined]
        memory = compiled.memory_analysis()

        def one() -> Any:
            nonlocal state
            state, measured = compiled(state, next(ready))
            return measured

        times = _times(one, steps + 2)[2:]
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return statistics.median(times), int(total)


def _times(function: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
