"""One training step: losses, gradients over micro-batches, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.objectives.objective import Objective, Pair, mean
from unified_mm.objectives.task import Task
from unified_mm.parallel.sharding import BATCH
from unified_mm.training.optimizer import Optimizer
from unified_mm.training.state import TrainState

Pairs = dict[str, Pair]


@struct.dataclass
class Measured:
    """What a step tells: metrics as (sum, count), the rate it used, and `TrainState.bad_step`."""

    pairs: Any
    learning_rate: Any
    bad_step: Any


def weighted_total(objectives: Sequence[Objective], pairs: Pairs, counts: Mapping[str, Any]) -> Any:
    """The weighted sum of mean losses, the counts being those of the whole batch."""
    return sum(
        objective.weight * mean((pairs[f"{objective.name}/loss"][0], counts[objective.name]))
        for objective in objectives
    )


def gradients(
    task: Task,
    optimizer: Optimizer,
    params: Any,
    batch: Any,
    key: jax.Array,
    micro_batches: int,
) -> tuple[Any, Any, Pairs]:
    """The total loss over the whole batch, its gradient by what is trained, and its pairs.

    With several micro-batches the gradient is that of the mean over all of them, also where they
    hold unequal numbers of scored tokens: they are counted first (which needs no forward pass, and
    the compiler drops it), then each adds its share. Contrast is within a micro-batch.
    """

    def counts_of(pairs: Pairs) -> dict[str, Any]:
        return {o.name: pairs[f"{o.name}/loss"][1] for o in task.objectives}

    def loss(part: Any, rows: Any, key: jax.Array, counts: Any) -> tuple[Any, Pairs]:
        pairs = task.pairs(optimizer.whole(part, params), rows, key, deterministic=False)
        return weighted_total(task.objectives, pairs, counts or counts_of(pairs)), pairs

    def differentiate(rows: Any, key: jax.Array, counts: Any) -> tuple[Any, Any, Pairs]:
        """Loss, gradient and pairs, each of which adds up over micro-batches."""
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, pairs), gradient = value_and_grad(optimizer.part(params), rows, key, counts)
        return total, gradient, pairs

    if micro_batches == 1:
        return differentiate(batch, key, None)
    parts = jax.tree.map(
        # Every device keeps rows of its own in each micro-batch: no rows move.
        lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
    keys = jax.random.split(key, micro_batches)
    counted = jax.lax.map(
        lambda part: counts_of(task.pairs(params, *part, deterministic=False)), (parts, keys)
    )
    counts = jax.tree.map(lambda x: x.sum(0), counted)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        rows, key = part
        return jax.tree.map(jnp.add, total, differentiate(rows, key, counts)), None

    rows, first_key = jax.tree.map(lambda x: x[0], (parts, keys))
    first = jax.eval_shape(differentiate, rows, first_key, counts)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return jax.lax.scan(add, zeros, (parts, keys))[0]


def make_train_step(
    task: Task,
    optimizer: Optimizer,
    mesh: Mesh,
    abstract: TrainState,
    *,
    micro_batches: int = 1,
    average_decay: float = 0.0,
) -> Callable[[TrainState, Any], tuple[TrainState, Measured]]:
    """The compiled step: state and batch -> next state (the old one is donated), and metrics."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Measured]:
        key = jax.random.fold_in(state.key, state.step)
        total, gradient, pairs = gradients(
            task, optimizer, state.params, batch, key, micro_batches
        )
        params, optimizer_state = optimizer.update(
            gradient, state.optimizer, state.params, state.step
        )
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1.0 - average_decay)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm) & (state.bad_step < 0)
        fresh = (params, optimizer_state, average)
        stale = (state.params, state.optimizer, state.average)
        params, optimizer_state, average = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), fresh, stale
        )
        bad = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        one = jnp.ones((), jnp.float32)
        pairs = {"loss": (total, one), **pairs, "gradient_norm": (norm, one)}
        new = TrainState(state.step + 1, params, optimizer_state, average, state.key, bad)
        return new, Measured(pairs, optimizer.rate(state.step), bad)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
