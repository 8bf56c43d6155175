"""Schedule-free AdamW: an average of the parameters is scored, and no decay of rates is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from unified_mm.training.update import Optimizer


@struct.dataclass
class ScheduleFreeState:
    """The state of schedule-free AdamW.

    Attributes:
      z: the sequence z of the paper, for what is trained.
      moments: Adam's second moments.
      weight: float32 [], the sum of the weights of the average.
    """

    z: Any
    moments: Any
    weight: Any


@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """Defazio et al. 2024, algorithm 1: gradients at y, steps of z, an average x of these.

    The parameters that are trained are y; x is what is scored. Each of a run's phases begins an
    average of its own. `transform` is Adam's without its first moment.

    Attributes:
      b1: y = (1 - b1) z + b1 x.
    """

    b1: float = 0.9

    def init(self, params: Any) -> ScheduleFreeState:
        part = self.part(params)
        zero = jnp.zeros((), jnp.float32)
        return ScheduleFreeState(jax.tree.map(jnp.copy, part), self.transform.init(part), zero)

    def update(
        self, gradient: Any, state: ScheduleFreeState, params: Any, step: Any
    ) -> tuple[Any, ScheduleFreeState]:
        y = self.part(params)
        updates, moments = self.transform.update(gradient, state.moments, y)
        rate = self.rate(step)
        x = self._mean_of(y, state.z)
        z = jax.tree.map(
            lambda z, u, y, factor, decay: z - rate * factor * (u + decay * y),
            state.z,
            updates,
            y,
            self.rates,
            self.decays,
        )
        weight = state.weight + rate**2
        share = jnp.where(weight > 0, rate**2 / jnp.where(weight > 0, weight, 1.0), 0.0)
        x = jax.tree.map(lambda x, z: (1.0 - share) * x + share * z, x, z)
        new = jax.tree.map(lambda x, z: self.b1 * x + (1.0 - self.b1) * z, x, z)
        return self.whole(new, params), ScheduleFreeState(z, moments, weight)

    def averaged(self, average: Any, params: Any, state: ScheduleFreeState, decay: Any) -> Any:
        return self.whole(self._mean_of(self.part(params), state.z), params)

    def _mean_of(self, y: Any, z: Any) -> Any:
        """Returns x, solved from y and z."""
        return jax.tree.map(lambda y, z: (y - (1.0 - self.b1) * z) / self.b1, y, z)
