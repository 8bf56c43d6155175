"""Dynamic loss scaling for half precision (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

START = 2.0**15
LARGEST = 2.0**24


@struct.dataclass
class LossScale:
    """What the loss is multiplied by before it is differentiated.

    Attributes:
      scale: float32 [], a power of two.
      good: int32 [], finite steps since it last changed.
      patience: after so many it doubles; static.
    """

    scale: Any
    good: Any
    patience: int = struct.field(pytree_node=False)

    @classmethod
    def start(cls, patience: int) -> LossScale:
        """Before the first step."""
        return cls(jnp.full((), START, jnp.float32), jnp.zeros((), jnp.int32), patience)

    def after(self, finite: Any) -> LossScale:
        """Half of it after an overflow (not below 1), twice after `patience` good steps."""
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
