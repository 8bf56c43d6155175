"""From gradients to new parameters: rates, decay, and what is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of the trained parameters; frozen ones have no state and keep their bits.

    Attributes:
      transform: transformation of the trained parameters' gradients, before decay and rate.
      schedule: the learning rate by step since `start`.
      trained: for each parameter, whether it is trained.
      rates, decays: factors of the learning rate and weight decay of each parameter, None where
        frozen.
      start: the step at which the schedule begins.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    trained: Any
    rates: Any
    decays: Any
    start: int = 0

    def init(self, params: Any) -> Any:
        """Returns the first state."""
        return self.transform.init(self.part(params))

    def part(self, params: Any) -> Any:
        """Returns the trained parameters, with None for the others (which jax takes as no leaf)."""
        return select(params, self.trained)

    def whole(self, part: Any, params: Any) -> Any:
        """Returns all parameters: trained ones of `part`, frozen ones of `params`."""
        return jax.tree.map(
            lambda new, old: old if new is None else new, part, params, is_leaf=lambda x: x is None
        )

    def rate(self, step: Any) -> Any:
        """Returns the learning rate of a step."""
        return self.schedule(jnp.asarray(step - self.start, jnp.float32))

    def update(self, gradient: Any, state: Any, params: Any, step: Any) -> tuple[Any, Any]:
        """Returns the parameters and the state after a step.

        Args:
          gradient: gradient of the trained part.
          state: as `init` or the step before gave it.
          params: all parameters.
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

    def averaged(self, average: Any, params: Any, state: Any, decay: Any) -> Any:
        """Returns the parameters to score after a step: a moving average over all steps.

        Args:
          average: the average after the step before.
          params, state: as `update` gave them.
          decay: decay of the moving average.
        """
        return optax.incremental_update(params, average, 1.0 - decay)


def select(tree: Any, chosen: Any) -> Any:
    """Returns the same tree with None for what is not chosen."""
    return jax.tree.map(lambda leaf, take: leaf if take else None, tree, chosen)
