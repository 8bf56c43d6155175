"""One training step: gradients, update, and what happens after a step that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.nn.transformer import rounded
from unified_mm.nn.unstack import LAYERS
from unified_mm.objectives.objective import CrossExampleLoss, Metric, Objective, mean, same_rank
from unified_mm.parallel.sharding import BATCH, ParamShardings, from_parts, into_parts
from unified_mm.task import Task
from unified_mm.training.state import TrainState
from unified_mm.training.treatment import Treatment
from unified_mm.training.update import Optimizer

# On a CPU, LLVM's third level takes a quarter of the compilation, and no step is faster by it. A
# TPU's compiler would divide a product whose weights it gathers into rounds of a ring, each of
# which reads and writes the whole sum: five times the memory traffic of gathering them first.
COMPILED: dict[str, dict[str, str | int]] = {
    "cpu": {"xla_backend_optimization_level": 2},
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}

Metrics = dict[str, Metric]


def compiler_options(platform: str) -> dict[str, str | int] | None:
    """Returns what a step's compiler is told, None for nothing.

    A CPU's is left alone where jax is set to optimise little, as tests set it.
    """
    if platform == "cpu" and jax.config.read("jax_disable_most_optimizations"):
        return None
    return COMPILED.get(platform)


@same_rank
def weighted_total(
    objectives: Sequence[Objective],
    metrics: Metrics,
    counts: Mapping[str, Any],
    factors: Mapping[str, Any] | None = None,
) -> Any:
    """Returns the weighted sum of mean losses.

    Args:
      objectives: with their weights.
      metrics: sums of the losses.
      counts: what the sums are divided by, over the whole batch, by objective.
      factors: factors of the weights at this step, by objective, where they change.
    """
    total: Any = 0
    for objective in objectives:
        loss = mean((metrics[f"{objective.name}/loss"][0], counts[objective.name]))
        factor = (factors or {}).get(objective.name)
        total += objective.weight * (loss if factor is None else factor * loss)
    return total


@same_rank
def inner(x: Any, pull: Any) -> Any:
    """Returns the sum of products of two arrays, element by element."""
    return (x * pull).sum()


def floats_of(tree: Any) -> list[Any]:
    """Returns the leaves of a tree that may be other than finite."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def counts_of(objectives: Sequence[Objective], metrics: Metrics) -> dict[str, Any]:
    """Returns the count that each objective's loss is divided by."""
    return {each.name: metrics[f"{each.name}/loss"][1] for each in objectives}


def row_major(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Asks the compiler for the memory layout of arrays that go in or out of a program.

    Without it a TPU's compiler lays out a product as is best for the product, and copies what it is
    added to, which comes and goes in this layout, before and after.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)

    def local(tree: Any) -> Any:  # on all of an array at once the compiler would gather it
        return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), tree)

    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(
        tree
    )


def gradients(
    task: Task,
    optimizer: Optimizer,
    params: Any,
    batch: Any,
    key: jax.Array,
    micro_batches: int,
    *,
    scale: Any = 1.0,
    placement: ParamShardings | None = None,
    step: Any = 0,
) -> tuple[Any, Any, Metrics]:
    """Returns the total loss over the whole batch, its gradient by what is trained, and metrics.

    Args:
      task: the task, with its objectives.
      optimizer: the optimizer, which knows what is trained.
      params, batch, key: parameters, batch and random key of the step.
      micro_batches: parts that the batch is split into.
      scale: the loss is multiplied by it before it is differentiated, and the gradient divided by
        it after, so that small gradients of half-precision activations do not vanish.
      placement: shardings of the parameters and their gradients; None leaves them as they come, and
        no kernel is rounded before its layer does.
      step: how many steps were done before.
    """

    def laid_out(gradient: Any) -> Any:
        if placement is None:
            return gradient
        shardings = optimizer.part(placement.gradients)
        gradient = jax.lax.with_sharding_constraint(gradient, shardings)
        return row_major(gradient, shardings, placement.mesh)

    def whole(part: Any) -> Any:
        if placement is not None:
            part = rounded_stacks(task, part, optimizer.part(placement.params))
        return optimizer.whole(part, params)

    if micro_batches == 1:

        def loss(part: Any) -> tuple[Any, tuple[Any, Metrics]]:
            metrics = task.metrics(whole(part), batch, key, deterministic=False, step=step)
            counts = counts_of(task.objectives, metrics)
            total = weighted_total(task.objectives, metrics, counts, task.weight_factors(step))
            return scale * total, (total, metrics)

        gradient, (total, metrics) = jax.grad(loss, has_aux=True)(optimizer.part(params))
        gradient = laid_out(gradient)
    else:
        trained = optimizer.part(params)
        accumulation = Accumulation(task, trained, whole, scale, laid_out, step)
        total, gradient, metrics = accumulation.run(batch, key, micro_batches)
    return total, jax.tree.map(lambda g: g / scale, gradient), metrics


def rounded_stacks(task: Task, params: Any, shardings: Any) -> Any:
    """Returns parameters with the kernels of all stacks that are in use `rounded`."""
    found = dict(params)
    for name, options in task.model.stacks.items():
        if name in params:
            layers = rounded(options, params[name][LAYERS], shardings[name][LAYERS])
            found[name] = {**params[name], LAYERS: layers}
    return found


@dataclass
class Accumulation:
    """Gradient accumulation that is exact, also for objectives that compare examples.

    An example's own loss adds up over micro-batches; how many are scored in all is counted first
    (which needs no forward pass, and the compiler drops it). A loss among all examples (contrast)
    does not: their embeddings are computed first, micro-batch by micro-batch and without gradient,
    and the loss is differentiated by the embeddings of the whole batch; then each micro-batch,
    computed again with the same randomness, propagates the gradient of its own embeddings back
    through the model (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory
    limited setup", section 3.2). Negatives that matching mines come from the same micro-batch.
    """

    task: Task
    part: Any  # the parameters that are trained
    whole: Callable[[Any], Any]  # makes all parameters of these
    scale: Any
    laid_out: Callable[[Any], Any]
    step: Any

    def __post_init__(self) -> None:
        self.factors = self.task.weight_factors(self.step)
        every = self.task.objectives
        self.comparing: list[Any] = [x for x in every if isinstance(x, CrossExampleLoss)]
        self.own: list[Any] = [x for x in every if x not in self.comparing]

    def run(self, batch: Any, key: jax.Array, micro_batches: int) -> tuple[Any, Any, Metrics]:
        """Returns the total loss, the gradient of `scale` times it, and metrics."""
        keys = jax.random.split(key, micro_batches)
        together = self.task.model.together
        into = partial(into_parts, parts=micro_batches, together=together)
        whole = partial(from_parts, together=together)
        rows = jax.tree.map(into, batch)
        counted, kept = jax.lax.map(lambda part: self.look(*part), (rows, keys))
        counts = jax.tree.map(lambda x: x.sum(0), counted)
        compared, gradient, pulls, compared_metrics = self.compare(jax.tree.map(whole, kept))

        def add(so_far: Any, part: Any) -> tuple[Any, None]:
            total, gradient, metrics = so_far
            loss, own, own_metrics = self.differentiate(part, counts)
            gradient = self.laid_out(jax.tree.map(jnp.add, gradient, own))
            return (total + loss, gradient, jax.tree.map(jnp.add, metrics, own_metrics)), None

        parts: Any = (rows, keys, jax.tree.map(into, pulls))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda part: self.differentiate(part, counts)[2], first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        start = (compared, self.laid_out(gradient), zeros)
        (total, gradient, metrics), _ = jax.lax.scan(add, start, parts)
        return total, gradient, metrics | compared_metrics

    def look(self, rows: Any, key: jax.Array) -> tuple[dict[str, Any], Any]:
        """Returns the counts of a micro-batch's own losses, and its embeddings."""
        metrics, embedded = self.task.metrics_and_embedded(
            self.whole(self.part), rows, key, deterministic=False, step=self.step
        )
        return counts_of(self.own, metrics), embedded

    def compare(self, embedded: Any) -> tuple[Any, Any, Any, Metrics]:
        """Computes the losses among all examples.

        Returns:
          Their total, its gradient by parameters and by embeddings (`scale` times), and metrics.
        """

        def loss(part: Any, vectors: Any) -> tuple[Any, tuple[Any, Metrics]]:
            whole = {name: each.replace(vectors=vectors[name]) for name, each in embedded.items()}
            metrics = self.task.compared(self.whole(part), whole)
            counts = counts_of(self.comparing, metrics)
            total = weighted_total(self.comparing, metrics, counts, self.factors)
            return self.scale * total, (jnp.asarray(total, jnp.float32), metrics)

        vectors = {name: each.vectors for name, each in embedded.items()}
        (gradient, pulls), (total, metrics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            self.part, vectors
        )
        return total, gradient, pulls, metrics

    def differentiate(self, part: Any, counts: Any) -> tuple[Any, Any, Metrics]:
        """Computes a micro-batch's share of the examples' own losses.

        Returns:
          The share, its gradient together with that through the embeddings, and metrics.
        """
        rows, key, pulls = part

        def loss(part: Any) -> tuple[Any, tuple[Any, Metrics]]:
            metrics, embedded = self.task.metrics_and_embedded(
                self.whole(part),
                rows,
                key,
                deterministic=False,
                step=self.step,
            )
            total = weighted_total(self.own, metrics, counts, self.factors)
            total = jnp.asarray(total, jnp.float32)
            vectors = {name: each.vectors for name, each in embedded.items()}
            pulled = jax.tree.map(inner, vectors, pulls)
            mine = {
                name: pair
                for name, pair in metrics.items()
                if not any(name.startswith(f"{each.name}/") for each in self.comparing)
            }
            return self.scale * total + sum(jax.tree.leaves(pulled)), (total, mine)

        gradient, (total, metrics) = jax.grad(loss, has_aux=True)(self.part)
        return total, gradient, metrics


@struct.dataclass
class StepMetrics:
    """The metrics of a step.

    Attributes:
      metrics: (sum, count) by name.
      learning_rate: the rate that the step used.
      bad_step: as in `TrainState`.
    """

    metrics: Any
    learning_rate: Any
    bad_step: Any


def decay_at(step: Any, decay: float) -> Any:
    """Returns the decay of a moving average that is warmed up, after `step` steps before.

    With `decay` from the first step on the average holds decay**steps of the random start.
    """
    done = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + done) / (10.0 + done))


def make_train_step(
    task: Task,
    optimizer: Optimizer,
    placement: ParamShardings,
    abstract: TrainState,
    *,
    micro_batches: int = 1,
    ema_decay: float = 0.0,
    ema_warmup: bool = False,
    treatment: Treatment | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]:
    """Returns the compiled step: state (donated) and batch -> next state and metrics.

    A step whose loss or gradient is not finite changes no parameter. Where the loss is scaled and
    the scale can fall, it does, and training goes on; else the step is named in `bad_step`.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        scaling = state.loss_scale
        total, gradient, metrics = gradients(
            task,
            optimizer,
            state.params,
            batch,
            key,
            micro_batches,
            scale=1.0 if scaling is None else scaling.scale,
            placement=placement,
            step=state.step,
        )
        norm = optax.tree.norm(gradient)
        kept, treated = state.treatment, norm
        if treatment is not None:
            kept, gradient = treatment(kept, gradient, state.params, metrics, state.step)
            treated = optax.tree.norm((gradient, floats_of(kept)))
        params, optimizer_state = optimizer.update(
            gradient, state.optimizer, state.params, state.step
        )
        average = state.average
        if average is not None:
            decay = decay_at(state.step, ema_decay) if ema_warmup else ema_decay
            average = optimizer.averaged(average, params, optimizer_state, decay)
        finite = jnp.isfinite(total) & jnp.isfinite(norm) & jnp.isfinite(treated)
        learned = finite & (state.bad_step < 0)
        fresh = (params, optimizer_state, average, kept)
        stale = (state.params, state.optimizer, state.average, state.treatment)
        params, optimizer_state, average, kept = jax.tree.map(
            lambda new, old: jnp.where(learned, new, old), fresh, stale
        )
        bad = ~finite if scaling is None else ~finite & ~scaling.can_fall
        bad_step = jnp.where((state.bad_step < 0) & bad, state.step, state.bad_step)
        one = jnp.ones((), jnp.float32)
        counts = one
        if scaling is not None:
            # What a skipped step would say is not finite, and is no part of a mean.
            counts = finite.astype(jnp.float32)
            metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
            total, norm = (jnp.where(finite, x, 0.0) for x in (total, norm))
            metrics |= {"loss_scale": (scaling.scale, one), "skipped": (1.0 - counts, one)}
        metrics = {"loss": (total, counts), **metrics, "gradient_norm": (norm, counts)}
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            average=average,
            key=state.key,
            bad_step=bad_step,
            loss_scale=None if scaling is None else scaling.after(finite),
            treatment=kept,
        )
        return new, StepMetrics(metrics, optimizer.rate(state.step), bad_step)

    mesh = placement.mesh
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
