"""Dense maps and norms, with parameters that carry logical axis names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unified_mm.nn.quantized import Quantized
from unified_mm.nn.tokens import Group

Initializer = Callable[..., Any]
PRODUCT = "product"  # the name by which remat knows what `Dense` computes


def partitioned(initializer: Initializer, *axes: str | None) -> Initializer:
    """Returns an initializer whose parameter has logical axis names, for `parallel.sharding`."""
    return nn.with_logical_partitioning(initializer, axes)


class Dense(nn.Module):
    """A dense map: `x @ kernel + bias` over the last `len(in_axes)` axes of x, with named axes.

    Attributes:
      features: output shape, e.g. `(heads, head_width)`.
      in_axes, out_axes: logical axis names of the kernel; their counts are the numbers of axes of
        the input that are contracted and of axes that come out.
      scale: multiplies the initial standard deviation `1 / sqrt(fan_in)`.
    """

    features: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    scale: float = 1.0
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        contracted = len(self.in_axes)
        in_shape = x.shape[x.ndim - contracted :]
        initializer = nn.initializers.variance_scaling(
            self.scale**2,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(contracted)),
            out_axis=tuple(range(contracted, contracted + len(self.features))),
        )
        kernel = self.param(
            "kernel",
            partitioned(initializer, *self.in_axes, *self.out_axes),
            (*in_shape, *self.features),
        )
        x = x.astype(self.dtype)
        if isinstance(kernel, Quantized):
            y = kernel.product(x, range(contracted)).astype(self.dtype)
        else:
            y = product(x, kernel.astype(self.dtype), contracted)
            y = checkpoint_name(y, PRODUCT)  # remat by `dots` cannot look into `product`
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, *self.out_axes)
            y = y + self.param("bias", zeros, self.features).astype(self.dtype)
        return y


class Choosing(Dense):
    """A dense map by whose outputs something is chosen: what is rounded may choose otherwise."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "..."], kernel: Any, contracted: int) -> Float[Array, "..."]:
    """Contracts the last axes of x with the first ones of a kernel; `contracted` is their number.

    The gradient of the kernel is a product over all rows, and one of its sides is transposed in
    memory first: here the narrower one, where jax would take that of the output.
    """
    return jnp.tensordot(x, kernel, axes=contracted)


def _product_forward(x: Array, kernel: Array, contracted: int) -> tuple[Array, Any]:
    return product(x, kernel, contracted), (x, kernel)


def _product_backward(contracted: int, kept: Any, cotangent: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows, inner = tuple(range(x.ndim - contracted)), kernel.shape[:contracted]
    last = tuple(range(len(rows), cotangent.ndim)), tuple(range(contracted, kernel.ndim))
    by_x = jax.lax.dot_general(cotangent, kernel, (last, ((), ())))
    if math.prod(inner) <= math.prod(kernel.shape[contracted:]):
        by_kernel = jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())))
    else:
        outer = kernel.ndim - contracted
        turned = jax.lax.dot_general(cotangent, x, ((rows, rows), ((), ())))
        by_kernel = jnp.moveaxis(turned, range(outer), range(contracted, kernel.ndim))
    return by_x, by_kernel


product.defvjp(_product_forward, _product_backward)


class Norm(nn.Module):
    """Layer normalisation (Ba et al. 2016) or RMS normalisation (Zhang & Sennrich 2019, eq. 4).

    [..., D] -> [..., D], statistics in float32. The RMS form has neither mean nor bias.

    Attributes:
      kind: 'layer' or 'rms'.
      axis: the logical axis of D.
    """

    kind: str = "layer"
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        width = x.shape[-1:]
        scale = self.param("scale", partitioned(nn.initializers.ones, self.axis), width)
        x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * scale
        if self.kind == "layer":
            bias = self.param("bias", partitioned(nn.initializers.zeros, self.axis), width)
            x = x + bias.astype(jnp.float32)
        return x.astype(self.dtype)


class PerModality(nn.Module):
    """One module for all tokens, or a copy of it for each modality.

    Attributes:
      make: builds the module, given its name: `make(name="shared")` or `make(name="image")`.
      separate: whether each modality has parameters of its own.
    """

    make: Callable[..., nn.Module]
    separate: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N ..."], groups: Sequence[Group]
    ) -> Float[Array, "B N ..."]:
        """Applies the shared module, or to each run of one modality (a static slice) its own."""
        if not self.separate:
            return self.make(name="shared")(x)
        modules: dict[str, nn.Module] = {}
        parts, start = [], 0
        for modality, length in merge_runs(groups):
            if modality not in modules:
                modules[modality] = self.make(name=modality)
            parts.append(modules[modality](x[:, start : start + length]))
            start += length
        return jnp.concatenate(parts, axis=1)


def merge_runs(groups: Sequence[Group]) -> list[tuple[str, int]]:
    """Returns (modality, length) for each run of neighbouring groups of one modality."""
    runs: list[tuple[str, int]] = []
    for group in groups:
        if runs and runs[-1][0] == group.modality:
            runs[-1] = (group.modality, runs[-1][1] + group.length)
        else:
            runs.append((group.modality, group.length))
    return runs
