"""A compiled training step with random batches at hand: it needs no data."""

from __future__ import annotations

import functools
import re
import statistics
import time
from collections import Counter
from itertools import cycle
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from unified_mm.benchmarks.timing import held_bytes, tree_bytes
from unified_mm.config import Config
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import rule_items, to_global
from unified_mm.task import Task, build_task
from unified_mm.training.ahead import compile_step, stand_in_data
from unified_mm.training.phases import training_flops
from unified_mm.training.setup import plan
from unified_mm.training.sizes import stand_in_for

FUSED_CALL = re.compile(r'custom_call_target="(__cudnn\$fmha\w*|tpu_custom_call)"')


class Trainer:
    """The training step of a config, compiled for this device when it is first asked about.

    Attributes:
      batch_size: examples of a batch.
      of_state: bytes of the state.
      vocabulary: tokens that have embeddings.
      batches: of random pictures and texts, on the host.
      state: of training, before the next step; there from `begin` on.
    """

    state: Any

    def __init__(self, config: Config, batches: int = 2) -> None:
        self._mesh = make_mesh(config.mesh)
        task = build_task(config, stand_in_for(config))
        self._make_state, (phase, *_) = plan(config, task, self._mesh, stand_in_data(config))
        self._phase = phase
        self.batch_size = phase.batch_size
        self.of_state = tree_bytes(phase.abstract)
        self.vocabulary = task.modalities["text"].embedding.vocabulary
        self.batches = [random_batch(task, phase.batch_size, seed) for seed in range(batches)]

    @functools.cached_property
    def _program(self) -> tuple[Any, float]:
        return compile_step(self._phase)

    @property
    def compiled(self) -> Any:
        """The program."""
        return self._program[0]

    @property
    def compile_seconds(self) -> float:
        """The seconds that tracing and compiling took."""
        return self._program[1]

    @property
    def held(self) -> int:
        """The bytes that a step holds: its state, a batch and the temporaries."""
        return held_bytes(self.compiled)

    def begin(self) -> None:
        """Compiles the step, makes the first state, and brings the batches to the device."""
        self.compiled  # noqa: B018  (before memory is taken)
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(rule_items()):
            self.state = self._phase.enter(self._make_state())
            self._ready = cycle([to_global(batch, self._mesh) for batch in self.batches])

    def step(self) -> Any:
        """Does a step, without waiting for it, and returns what it measured."""
        self.state, measured = self.compiled(self.state, next(self._ready))
        return measured

    def loss(self) -> float:
        """Does a step and returns its loss."""
        total, count = jax.device_get(self.step().metrics["loss"])
        return float(total / count)

    def seconds(self, steps: int) -> float:
        """Returns the seconds that each of `steps` steps takes."""
        began = time.perf_counter()
        for _ in range(steps):
            measured = self.step()
        jax.block_until_ready(measured)
        return (time.perf_counter() - began) / steps

    def measured(self, peaks: dict[str, Any], steps: int, turns: int) -> dict[str, Any]:
        """Trains, and returns speed, memory, and the share of both peaks that products take."""
        self.begin()
        losses = [self.loss() for _ in range(3)]  # warms up
        taken = [self.seconds(steps) for _ in range(turns)]
        if not np.isfinite(losses).all():
            raise ValueError(f"losses {losses} are not finite")
        seconds = statistics.median(taken)
        return {
            "batch": self.batch_size,
            "samples_per_second": round(self.batch_size / seconds, 1),
            "step_seconds": round(seconds, 5),
            "step_seconds_of_turns": [round(each, 5) for each in taken],
            "compile_seconds": round(self.compile_seconds, 1),
            "held_bytes": self.held,
            "first_losses": [round(loss, 4) for loss in losses],
            "fused_calls": fused_calls(self.compiled),
            **utilisation(training_flops(self._phase) / seconds, peaks),
        }


def random_batch(task: Task, size: int, seed: int) -> dict[str, dict[str, Any]]:
    """Returns examples with random pictures, and random texts of half their length or more."""
    rng = np.random.default_rng(seed)
    batch = task.example_batch(size)
    image, text = batch["image"], batch["text"]
    image["pixels"] = rng.integers(0, 256, image["pixels"].shape, np.uint8)
    length = text["ids"].shape[1]
    valid = np.arange(length) < rng.integers(length // 2, length + 1, (size, 1))
    used = task.modalities["text"].embedding.used
    ids = rng.integers(3, used, valid.shape)
    text["ids"] = np.where(valid, ids, 0).astype(text["ids"].dtype)
    text["valid"], text["scored"] = valid, valid & (np.arange(length) > 0)
    for each in (image, text):
        each["present"] = np.ones(size, bool)
    return batch


def fused_calls(compiled: Any) -> dict[str, int]:
    """Returns how often a program calls each fused kernel; what a scan holds counts once."""
    return dict(Counter(FUSED_CALL.findall(compiled.as_text())))


def utilisation(flops: float, peaks: dict[str, Any]) -> dict[str, Any]:
    """Returns FLOP/s, and their share of two peaks of bfloat16 products; None of one not known.

    Args:
      flops: a second, of the model's own products.
      peaks: of the card's specification, dense, and as measured.
    """
    of = {"dense_specification": "dense_specification_flops", "measured_peak": "measured_flops"}
    return {
        "tera_flops_per_second": round(flops / 1e12, 3),
        **{
            f"mfu_of_{name}": round(flops / peaks[key], 4) if key in peaks else None
            for name, key in of.items()
        },
    }


def device_memory(otherwise: int) -> int:
    """Returns the bytes that jax may take of this device; `otherwise` where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", otherwise))
