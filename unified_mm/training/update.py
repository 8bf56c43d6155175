"""From gradients to new parameters: rates, decay, and what is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Optimizer:
    """Turns gradients into new parameters; what is frozen has no state and keeps its bits.

    Attributes:
      transform: of the trained parameters' gradients, before decay and rate.
      schedule: the learning rate by step since `start`.
      trained: for each parameter, whether it is.
      rates, decays: factors of the learning rate and of the weights' decay, None where frozen.
      start: the step at which the schedule begins.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    trained: Any
    rates: Any
    decays: Any
    start: int = 0

    def init(self, params: Any) -> Any:
        """The first state."""
        return self.transform.init(self.part(params))

    def part(self, params: Any) -> Any:
        """The trained parameters, with None for the others (which jax takes as no leaf)."""
        return select(params, self.trained)

    def whole(self, part: Any, params: Any) -> Any:
        """All parameters: those of `part`, and of `params` what is frozen."""
        return jax.tree.map(
            lambda new, old: old if new is None else new, part, params, is_leaf=lambda x: x is None
        )

    def rate(self, step: Any) -> Any:
        """The learning rate of a step."""
        return self.schedule(jnp.asarray(step - self.start, jnp.float32))

    def update(self, gradient: Any, state: Any, params: Any, step: Any) -> tuple[Any, Any]:
        """The parameters and the state after a step.

        Args:
          gradient: of the trained part.
          state: as `init` or the step before gave it.
          params: all of them.
          step: how many steps were done before.
        """
        part = self.part(params)
        updates, state = self.transform.update(gradient, state, part)
        size = self.rate(step)
        new = jax.tree.map(
            lambda p, u, rate, decay: p - size * rate * (u + decay * p),
            part,
            updates,
            self.rates,
            self.decays,
        )
        return self.whole(new, params), state

    def averaged(self, average: Any, params: Any, state: Any, decay: float) -> Any:
        """The parameters that are scored, after a step: a moving average over all steps.

        Args:
          average: after the step before.
          params, state: as `update` gave them.
          decay: of the moving average.
        """
        return optax.incremental_update(params, average, 1.0 - decay)


def select(tree: Any, chosen: Any) -> Any:
    """The same tree with None for what is not chosen."""
    return jax.tree.map(lambda leaf, take: leaf if take else None, tree, chosen)
