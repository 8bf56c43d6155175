"""Speed and memory of training a recipe, and the effect of each way to save memory."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import cycle, islice
from typing import Any

import flax.linen as nn
import jax

from unified_mm.benchmarks.timing import (
    fused_attention,
    held_bytes,
    matmul_peak,
    percentiles,
    provenance,
    resident_bytes,
    times_of,
    tree_bytes,
)
from unified_mm.config import Config
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.runs.folder import RunFolder
from unified_mm.training.loop import phase_batches
from unified_mm.training.phases import training_flops
from unified_mm.training.setup import Setup, prepare

WARM_UP = 2  # steps that are not timed


def measure(setup: Setup, steps: int) -> dict[str, Any]:
    """Measures training one config on this device; rates are per second, sizes in bytes."""
    batch_size = setup.phases[0].batch_size
    peak = matmul_peak(setup.task.model.options.dtype)
    loader, resident = loader_alone(setup, steps)
    step = Step(setup)
    began = time.process_time()
    seconds = statistics.median(step.seconds(steps))
    cpu_seconds = (time.process_time() - began) / (steps + WARM_UP)
    flops = training_flops(setup.phases[0])
    return {
        "steps_per_second": round(1 / seconds, 3),
        "cpu_seconds_per_step": round(cpu_seconds, 4),
        "images_per_second": round(batch_size / seconds, 1),
        "loader_images_per_second": round(loader, 1),
        "loader_times_training": round(loader * seconds / batch_size, 2),
        "loader_images": steps * batch_size,
        "loader_resident_bytes": resident,
        "model_flops_per_step": flops,
        "matmul_peak_flops": round(peak),
        "mfu": round(flops / seconds / peak / len(jax.devices()), 4),
        "compiled_step_bytes": step.bytes,
        "batch_size": batch_size,
        **provenance(),
    }


def loader_alone(setup: Setup, steps: int) -> tuple[float, list[int]]:
    """Measures the data pipeline by itself.

    Returns:
      The examples a second; and the memory that this process holds after the first batch, after
      half of them and after the last.
    """
    batches = phase_batches(setup, setup.phases[0], 0)
    resident: list[int] = []

    def read() -> None:
        for _ in islice(batches, steps):
            resident.append(resident_bytes())

    with closing(batches):  # type: ignore[type-var]
        for _ in islice(batches, 3):
            pass
        (seconds,) = times_of(read, 1)
    rate = steps * setup.phases[0].batch_size / seconds
    return rate, [resident[place] for place in (0, steps // 2, -1)]


class Step:
    """The compiled training step of a run's first phase, with batches at hand.

    Attributes:
      bytes: bytes that the step holds while it runs.
      weight_bytes: bytes of the parameters.
    """

    def __init__(self, setup: Setup, batches: int = 2) -> None:
        self._setup = setup
        phase = setup.phases[0]
        with _on(setup):
            self._state = phase.enter(setup.make_state())
            with closing(phase_batches(setup, phase, 0)) as read:  # type: ignore[type-var]
                ready = [to_global(next(read), setup.mesh) for _ in range(batches)]
            self._compiled = phase.step.lower(self._state, ready[0]).compile()
        self._batches = cycle(ready)
        self.bytes = held_bytes(self._compiled)
        self.weight_bytes = tree_bytes(self._state.params)

    def seconds(self, steps: int) -> list[float]:
        """Returns the seconds of each of `steps` steps, after those that warm up."""
        with _on(self._setup):
            return times_of(self._one, steps + WARM_UP)[WARM_UP:]

    def loss(self) -> float:
        """Returns the loss of one more step."""
        with _on(self._setup):
            total, count = jax.device_get(self._one().metrics["loss"])
        return float(total / count)

    def _one(self) -> Any:
        self._state, measured = self._compiled(self._state, next(self._batches))
        return measured


@contextmanager
def _on(setup: Setup) -> Iterator[None]:
    with jax.set_mesh(setup.mesh), nn.logical_axis_rules(rule_items()):
        yield


def training_table(
    fields: Mapping[str, Any], steps: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measures each way to train a run's config: speed, memory, and the loss after some steps.

    Every row trains from the start on the same batches; the last row's batch is the largest
    multiple (2, 4 or 8) that fits into the memory of the first row.

    Args:
      fields: the fields of a run's config.
      steps: number of training steps for each row, after two that warm up.
      say: called with a line for each row.

    Returns:
      A row for each way.
    """
    fused = fused_attention()
    rows: list[dict[str, Any]] = []

    def add(name: str, batch: int, **options: str) -> Step:
        step = Step(_prepared(fields, batch, options), batches=steps + 2)
        times = step.seconds(steps - 1)
        rows.append(
            {
                "name": name,
                "batch": batch,
                "samples_per_second": round(batch / statistics.median(times), 2),
                **percentiles(times),
                "peak_bytes": step.bytes,
                "weight_bytes": step.weight_bytes,
                "steps": steps + 2,
                "loss": round(step.loss(), 4),
            }
        )
        say(_line(rows[-1]))
        return step

    batch = int(fields["train"]["batch_size"])
    first = add("baseline", batch, dtype="float32", attention="xla", remat="none")
    add("bfloat16", batch, dtype="bfloat16", attention="xla", remat="none")
    add(f"+ {fused}", batch, dtype="bfloat16", attention=fused, remat="none")
    lean = {"dtype": "bfloat16", "attention": fused, "remat": "full"}
    add("+ remat", batch, **lean)
    larger = batch
    while larger < 8 * batch and step_bytes(_prepared(fields, 2 * larger, lean)) <= first.bytes:
        larger *= 2
    if larger > batch:
        add("+ larger batch", larger, **lean)
    return rows


def step_bytes(setup: Setup) -> int:
    """Returns the bytes that the compiled step would hold; allocates nothing."""
    phase = setup.phases[0]
    batch = jax.eval_shape(
        lambda: jax.tree.map(jax.numpy.asarray, phase.task.example_batch(phase.batch_size))
    )
    with _on(setup):
        return held_bytes(phase.step.lower(phase.abstract, batch).compile())


def _prepared(fields: Mapping[str, Any], batch: int, options: Mapping[str, str]) -> Setup:
    changed = copy.deepcopy(dict(fields))
    changed["model"].update(options)
    changed["train"].update(batch_size=batch, phases={})
    with tempfile.TemporaryDirectory() as folder:
        return prepare(Config(changed), RunFolder(folder), lambda line: None)


def _line(row: Mapping[str, Any]) -> str:
    return (
        "{name:<16} batch {batch:>5}  {samples_per_second:>9.2f} samples/s  "
        "{peak_bytes:>15,} B  loss {loss:.4f}".format(**row)
    )
