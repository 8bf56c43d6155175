"""Weights stored as int8, and products with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Quantized:
    """An array in symmetric int8 with a scale for each channel: about `values * scale`.

    It replaces the array in a parameter tree; a scan over layers slices it like any other leaf,
    since the scales have all axes of the values.

    Attributes:
      values: int8, of the array's shape.
      scale: float32, the same shape with 1 for each axis that a product contracts.
      activations: 'int8' where the other factor of a product is rounded too, each vector by its own
        largest magnitude, else ''; static.
    """

    values: Any
    scale: Any
    activations: str = struct.field(pytree_node=False, default="")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.values.shape)

    def floats(self) -> Float[Array, "..."]:
        """Returns the array, dequantized to float32."""
        return self.values.astype(jnp.float32) * self.scale

    def __getitem__(self, rows: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns rows of a table [V, D], float32."""
        return self.values[rows].astype(jnp.float32) * self.scale[rows]

    def product(self, x: Float[Array, "..."], axes: Sequence[int]) -> Float[Array, "..."]:
        """Returns the last axes of x contracted with `axes` of this array, in order; float32.

        Without int8 activations the numbers are multiplied in x's own type, which represents every
        int8 exactly, and the scales are applied after the sum.
        """
        first = x.ndim - len(axes)
        dimensions = ((tuple(range(first, x.ndim)), tuple(axes)), ((), ()))
        # Tied to x, the values are turned to floats where they are used: a loop around this would
        # otherwise have the floats of all weights made before it begins.
        values, x = jax.lax.optimization_barrier((self.values, x))
        if self.activations and x.size:  # qwix rounds no empty array
            import qwix

            rounded = qwix.quantize(
                x.astype(jnp.float32), self.activations, channelwise_axes=range(first)
            )
            with jax.numpy_dtype_promotion("standard"):  # it scales an int32 sum by floats
                return qwix.dot_general(rounded, qwix.QArray(values, self.scale), dimensions)
        y = jax.lax.dot_general(
            x, values.astype(x.dtype), dimensions, preferred_element_type=jnp.float32
        )
        kept = [size for axis, size in enumerate(self.shape) if axis not in axes]
        return y * self.scale.reshape(kept)
