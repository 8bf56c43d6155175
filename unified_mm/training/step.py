"""One training step: gradients, update, and what becomes of a step that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.objectives.task import Task
from unified_mm.parallel.sharding import BATCH, Placement
from unified_mm.training.gradients import gradients
from unified_mm.training.state import TrainState
from unified_mm.training.update import Optimizer


@struct.dataclass
class Measured:
    """What a step tells: metrics as (sum, count), the rate it used, and `TrainState.bad_step`."""

    pairs: Any
    learning_rate: Any
    bad_step: Any


def make_train_step(
    task: Task,
    optimizer: Optimizer,
    placement: Placement,
    abstract: TrainState,
    *,
    micro_batches: int = 1,
    average_decay: float = 0.0,
) -> Callable[[TrainState, Any], tuple[TrainState, Measured]]:
    """The compiled step: state and batch -> next state (the old one is donated), and metrics.

    A step whose loss or gradient is not finite changes no parameter. Where the loss is scaled and
    the scale can fall, it does, and training goes on; else the step is named in `bad_step`.
    """
    gradient_shardings = optimizer.part(placement.gradients)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Measured]:
        key = jax.random.fold_in(state.key, state.step)
        scaling = state.loss_scale
        total, gradient, pairs = gradients(
            task,
            optimizer,
            state.params,
            batch,
            key,
            micro_batches,
            scale=1.0 if scaling is None else scaling.scale,
            shardings=gradient_shardings,
        )
        params, optimizer_state = optimizer.update(
            gradient, state.optimizer, state.params, state.step
        )
        average = state.average
        if average is not None:
            average = optimizer.averaged(average, params, optimizer_state, average_decay)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        learned = finite & (state.bad_step < 0)
        fresh = (params, optimizer_state, average)
        stale = (state.params, state.optimizer, state.average)
        params, optimizer_state, average = jax.tree.map(
            lambda new, old: jnp.where(learned, new, old), fresh, stale
        )
        bad = ~finite if scaling is None else ~finite & ~scaling.can_fall
        bad_step = jnp.where((state.bad_step < 0) & bad, state.step, state.bad_step)
        one = jnp.ones((), jnp.float32)
        counts = one
        if scaling is not None:
            # What a skipped step would say is not finite, and is no part of a mean.
            counts = finite.astype(jnp.float32)
            pairs = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), pairs)
            total, norm = (jnp.where(finite, x, 0.0) for x in (total, norm))
            pairs |= {"loss_scale": (scaling.scale, one), "skipped": (1.0 - counts, one)}
        pairs = {"loss": (total, counts), **pairs, "gradient_norm": (norm, counts)}
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            average=average,
            key=state.key,
            bad_step=bad_step,
            loss_scale=None if scaling is None else scaling.after(finite),
        )
        return new, Measured(pairs, optimizer.rate(state.step), bad_step)

    mesh = placement.mesh
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
