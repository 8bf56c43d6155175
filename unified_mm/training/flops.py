"""Floating-point operations of the matrix products in one step of a phase, traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax

from unified_mm.costs.flops import matmul_flops
from unified_mm.parallel.sharding import rule_items
from unified_mm.task import Task
from unified_mm.training.phases import Phase, batch_shapes
from unified_mm.training.step import gradients


def training_flops(phase: Phase) -> int:
    """Counts the FLOPs of the loss and of its gradient by what a phase trains.

    Recomputation is left out.
    """
    plain = phase.task.model.without_recomputation()
    return _gradient_flops(phase, replace(phase.task, model=plain), 1)


def computed_flops(phase: Phase) -> int:
    """Counts the same FLOPs as a step computes them, with recomputation."""
    return _gradient_flops(phase, phase.task, phase.micro_batches)


def _gradient_flops(phase: Phase, task: Task, micro_batches: int) -> int:
    def gradient(params: Any, batch: Any, key: jax.Array) -> Any:
        return gradients(task, phase.optimizer, params, batch, key, micro_batches)[1]

    with jax.set_mesh(phase.placement.mesh), nn.logical_axis_rules(rule_items()):
        return matmul_flops(
            gradient,
            phase.abstract.params,
            batch_shapes(phase.rows, phase.batch_size),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
