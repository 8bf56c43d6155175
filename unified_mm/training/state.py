"""TrainState: everything that a step reads and writes, as one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.parallel.sharding import ParamShardings, shardings_like, without_names
from unified_mm.training.treatment import Treatment
from unified_mm.training.update import Optimizer

START = 2.0**15
LARGEST = 2.0**24


@struct.dataclass
class LossScale:
    """The dynamic scale that the loss is multiplied by before it is differentiated.

    Attributes:
      scale: float32 [], a power of two.
      good: int32 [], finite steps since the scale last changed.
      patience: finite steps after which it doubles; static.
    """

    scale: Any
    good: Any
    patience: int = struct.field(pytree_node=False)

    @classmethod
    def start(cls, patience: int) -> LossScale:
        """Returns the scale before the first step."""
        return cls(jnp.full((), START, jnp.float32), jnp.zeros((), jnp.int32), patience)

    def after(self, finite: Any) -> LossScale:
        """Returns the scale after a step.

        It is halved after an overflow (not below 1) and doubled after `patience` finite steps.
        """
        good = jnp.where(finite, self.good + 1, 0)
        grown = good >= self.patience
        larger = jnp.minimum(self.scale * 2.0, LARGEST)
        smaller = jnp.maximum(self.scale * 0.5, 1.0)
        scale = jnp.where(finite, jnp.where(grown, larger, self.scale), smaller)
        return LossScale(scale, jnp.where(grown, 0, good), self.patience)

    @property
    def can_fall(self) -> Any:
        """Whether an overflow may be the scale's fault."""
        return self.scale > 1.0


# Parts of the state that checkpoints of earlier versions do not have: they begin with the values
# that a new run begins with.
LATER_SLOTS = ("treatment",)


@struct.dataclass
class TrainState:
    """The state after `step` steps.

    Attributes:
      step: int32 [], which is also the position in the data.
      params: the model's and the objectives' parameters.
      optimizer: its state, for what is trained in the present phase.
      average: averaged parameters, which are scored (a moving average, or the optimizer's own), or
        None.
      key: random key that every step's randomness is folded from.
      bad_step: int32 [], the first step whose loss or gradient was not finite, else -1; from
        there on nothing is updated.
      loss_scale: the scale of the loss in half-precision training, or None.
      treatment: the state of `train.treatment`, or None.
    """

    step: Any
    params: Any
    optimizer: Any
    average: Any
    key: Any
    bad_step: Any
    loss_scale: Any = None
    treatment: Any = None


def key_of_params(seed: int) -> jax.Array:
    """Returns the random key that a run's first parameters are drawn with."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def initial_state(
    init_params: Callable[[jax.Array], Any],
    placement: ParamShardings,
    seed: int,
    *,
    averaged: bool,
    scale_patience: int = 0,
    treatment: Treatment | None = None,
) -> tuple[jax.stages.Wrapped, TrainState]:
    """Returns a function that makes the first state on a mesh, and that state's shapes.

    The state has no optimizer before a phase gives it one.

    Args:
      init_params: key -> parameters boxed with logical axis names.
      placement: their shardings.
      seed: seed of the initial parameters and of all steps.
      averaged: whether averaged parameters are kept.
      scale_patience: finite steps after which the loss's scale doubles; 0 scales no loss.
      treatment: its state is part of this one.

    Returns:
      A function that makes the first state (sharded as it is made), and the abstract state
      (shapes, types and shardings).
    """

    def make() -> TrainState:
        params = without_names(init_params(key_of_params(seed)))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=None,
            average=jax.tree.map(jnp.copy, params) if averaged else None,
            key=jax.random.fold_in(jax.random.key(seed), 1),
            bad_step=jnp.full((), -1, jnp.int32),
            loss_scale=LossScale.start(scale_patience) if scale_patience else None,
            treatment=treatment.init(params) if treatment else None,
        )

    with jax.set_mesh(placement.mesh):
        shapes = jax.eval_shape(make)
    replicated = NamedSharding(placement.mesh, P())
    shardings = jax.tree.map(lambda leaf: replicated, shapes).replace(
        params=placement.params,
        average=placement.moments if averaged else None,
        # As the parameters that it copies.
        treatment=shardings_like(shapes.params, placement.moments, shapes.treatment, replicated),
    )
    made = jax.jit(make, out_shardings=shardings, compiler_options=compiled_for_once())
    return made, _abstract(shapes, shardings)


def compiled_for_once() -> dict[str, Any] | None:
    """Returns the options of a compiler for a program that runs once: on a CPU, not to optimise.

    The first parameters compile in a third of the CPU seconds so, in half of the time.
    """
    if jax.default_backend() != "cpu":
        return None
    # Without XLA's fusion emitters; later versions have no others.
    emitters = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        **emitters,
    }


def state_of_phase(
    abstract: TrainState, optimizer: Optimizer, placement: ParamShardings
) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
    """Returns what states look like in a phase, and how the phase begins.

    Args:
      abstract: any abstract state of the run.
      optimizer: the phase's optimizer.
      placement: shardings of the parameters.

    Returns:
      The abstract state, and a function that returns the state before with the optimizer's first
      state.
    """
    shapes = jax.eval_shape(optimizer.init, abstract.params)
    replicated = NamedSharding(placement.mesh, P())
    shardings = shardings_like(abstract.params, placement.moments, shapes, replicated)
    begin = jax.jit(optimizer.init, out_shardings=shardings, compiler_options=compiled_for_once())

    def enter(state: TrainState) -> TrainState:
        return state.replace(optimizer=begin(state.params))  # type: ignore[attr-defined]

    return abstract.replace(optimizer=_abstract(shapes, shardings)), enter  # type: ignore[attr-defined]


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def evaluation_params(state: TrainState) -> Any:
    """Returns the parameters that scores are taken with: averaged ones where there are any."""
    return state.params if state.average is None else state.average
