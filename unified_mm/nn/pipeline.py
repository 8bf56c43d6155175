"""Pipeline parallelism: a stack's periods on several stages, which micro-batches pass through.

The stages are one array axis that the mesh divides: each tick runs all of them under `vmap`, each
on a micro-batch of its own, then a roll hands every stage's output to the next (Huang et al. 2019,
GPipe, section 2.2; the form for GSPMD: Xu et al. 2021, section 3.3). So its gradient comes from
autodiff, and it composes with every other axis of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.parallel.sharding import constrain, from_parts, into_parts


@dataclass(frozen=True)
class Pipeline:
    """The division of a stack into stages and of its batch into micro-batches.

    Attributes:
      stages: how many stages the periods are divided among.
      micro_batches: how many micro-batches the batch is divided into.
    """

    stages: int
    micro_batches: int

    @property
    def ticks(self) -> int:
        """The number of ticks until the last micro-batch leaves the last stage."""
        return self.micro_batches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they are idle (GPipe, section 2.3)."""
        return (self.stages - 1) / self.ticks


# Parameters and cached arrays of one period, x [rows, N, D] of a micro-batch, what all layers read,
# the number of the micro-batch -> the next x, and the period's keys and values, arrays [rows, ...].
PeriodFunction = Callable[[Any, Any, Array, Any, Array], tuple[Array, Any]]


def run_pipeline(
    pipeline: Pipeline,
    period: PeriodFunction,
    params: Any,
    cached: Any,
    x: Float[Array, "B N D"],
    beside: Any,
    *,
    together: int = 1,
) -> tuple[Float[Array, "B N D"], Any]:
    """Returns the stack's output, as a scan of `period` over the periods would give it.

    Args:
      pipeline: stages, which divide the periods, and micro-batches, which divide B.
      period: runs one period on one micro-batch.
      params: arrays [periods, ...].
      cached: arrays [periods, B, ...].
      x: embeddings.
      beside: what all layers read: arrays [B, ...] and scalars.
      together: so many neighbouring examples stay in one micro-batch.

    Returns:
      x [B, N, D] after the last period, and what else each period returned, [periods, B, ...].

    Raises:
      ValueError: the stages do not divide the periods, or the micro-batches do not divide B.
    """
    count, stages = pipeline.micro_batches, pipeline.stages
    periods = len(jax.tree.leaves(params)[0])
    if periods % stages:
        raise ValueError(f"{periods} periods of layers are not divided by mesh.stage={stages}")
    if x.shape[0] % (count * together):
        raise ValueError(
            f"a batch of {x.shape[0]} is not divided into {count} parts for the pipeline"
            + f", of whole groups of {together}" * (together > 1)
            + ": change train.batch_size or mesh.stage_micro_batches"
        )
    into = partial(into_parts, parts=count, together=together)
    inputs = into(x)
    beside = jax.tree.map(lambda leaf: into(leaf) if jnp.ndim(leaf) else leaf, beside)
    params = jax.tree.map(lambda leaf: _by_stage(leaf, stages), params)
    cached = jax.tree.map(lambda leaf: _by_stage(jax.vmap(into)(leaf), stages), cached)

    def stage(params: Any, cached: Any, x: Array, number: Array) -> tuple[Array, Any]:
        """Runs one stage's periods on the micro-batch `number`."""
        own = jax.tree.map(lambda leaf: leaf[number] if jnp.ndim(leaf) else leaf, beside)

        def one(x: Array, layer: Any) -> tuple[Array, Any]:
            params, cached = layer
            return period(params, cached, x, own, number)

        seen = jax.tree.map(lambda leaf: leaf[:, number], cached)
        return jax.lax.scan(one, x, (params, seen))

    def tick(before: Array, time: Array) -> tuple[Array, Any]:
        arriving = inputs[jnp.minimum(time, count - 1)]
        x = jnp.roll(before, 1, axis=0).at[0].set(arriving)
        x = constrain(x, "stages", "batch", "length", "activation")
        # A stage that has nothing to do yet, or no more, works on what is thrown away.
        numbers = jnp.clip(time - jnp.arange(stages), 0, count - 1)
        x, kv = jax.vmap(stage, spmd_axis_name="stage")(params, cached, x, numbers)
        return x, (x[-1], kv)

    empty = jnp.zeros((stages, *inputs.shape[1:]), x.dtype)
    _, (left, kv) = jax.lax.scan(tick, empty, jnp.arange(pipeline.ticks))
    kv = jax.tree.map(lambda leaf: _in_order(leaf, count, together), kv)
    return from_parts(left[stages - 1 :], together), kv


def _by_stage(x: Array, stages: int) -> Array:
    """Splits [periods, ...] into [stages, periods / stages, ...], a stage having neighbours."""
    return x.reshape(stages, x.shape[0] // stages, *x.shape[1:])


def _in_order(kv: Array, count: int, together: int) -> Array:
    """Reorders [ticks, stages, periods / stages, rows, ...] to [periods, B, ...].

    Stage s works on micro-batch m, which has `rows` examples, at tick m + s.
    """
    stages, each = kv.shape[1:3]
    own = jnp.stack([kv[s : s + count, s] for s in range(stages)])  # [stages, count, each, ...]
    by_period = own.swapaxes(1, 2).reshape(stages * each, count, *kv.shape[3:])
    return jax.vmap(partial(from_parts, together=together))(by_period)
