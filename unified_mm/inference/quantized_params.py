"""Parameter trees in which weights are int8: which of them, how they are made, and back again.

Symmetric, with a scale for every output channel of a product (Krishnamoorthi 2018,
"Quantizing deep convolutional networks for efficient inference", section 3.1). Each layer of a
stack has scales of its own, so a scan over layers slices them with the weights.

Dense kernels and the text's embedding tables become int8. Norms, biases, positions and gates stay
float32: they are few, and are added or multiplied by, not summed over. So do the kernels by which
something is chosen (`Choosing`: experts, neurons, tokens that are dropped): rounded, they would
choose otherwise.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.config import Config
from unified_mm.modalities.text import TextEmbedder
from unified_mm.nn.experts import ExpertDense
from unified_mm.nn.layers import Choosing, Dense
from unified_mm.nn.quantized import Quantized
from unified_mm.parallel.sharding import path_of
from unified_mm.task import Task

Axes = tuple[int, ...]  # that a product contracts, counted from the last: -1, -2


def need_qwix() -> None:
    """Checks that qwix, which rounds to int8 and multiplies int8, is installed.

    Raises:
      ValueError: it is not.
    """
    if importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "qwix is not installed, which makes int8 numbers and multiplies them: "
            "pip install 'unified_mm[quantize]'"
        )


def trace(
    task: Task, floats: tuple[type[nn.Module], ...] = (Choosing,)
) -> tuple[Any, dict[str, Axes]]:
    """Traces a task's model to find the shapes of its float parameters and which become int8.

    Nothing is computed: every dense layer and embedding table that the model calls is noted.

    Args:
      task: the task.
      floats: kinds of layers whose kernels stay floats.

    Returns:
      The shapes, boxed with axis names, and by path of each parameter that becomes int8 the axes
      that products contract.
    """
    found: dict[str, Axes] = {}

    def note(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        if context.method_name == "__call__" and not isinstance(context.module, floats):
            axes = _axes_within(context.module)
            found.update({"/".join((*context.module.path, name)): axes[name] for name in axes})
        return call(*arguments, **options)

    with nn.intercept_methods(note):
        # A function of its own: what is traced already would not be traced again.
        return jax.eval_shape(lambda key: task.init(key), jax.random.key(0)), found


def _axes_within(module: nn.Module) -> dict[str, Axes]:
    """Returns the axes that products contract, by name of a module's own parameters."""
    if isinstance(module, Dense):
        outputs = len(module.features)
        return {"kernel": tuple(range(-outputs - len(module.in_axes), -outputs))}
    if isinstance(module, ExpertDense):
        return {"kernel": (-2,)}
    if isinstance(module, TextEmbedder):
        return {"tokens": (-1,), "scores": (-1,)}
    return {}


def quantize_params(task: Task, params: Any, activations: str = "") -> Any:
    """Quantises those of a task's float parameters that `trace` finds.

    Args:
      task: the task.
      params: its float parameters.
      activations: as in `Quantized`.

    Raises:
      ValueError: qwix is not installed.
    """
    need_qwix()
    import qwix

    _, axes = trace(task)

    def one(path: Any, leaf: Any) -> Any:
        contracted = axes.get(path_of(path))
        if contracted is None:
            return leaf
        channels = [axis for axis in range(leaf.ndim) if axis - leaf.ndim not in contracted]
        made = qwix.quantize(leaf.astype(jnp.float32), "int8", channelwise_axes=channels)
        return Quantized(made.qvalue, made.scale, activations)

    return jax.tree_util.tree_map_with_path(one, params)


def dequantized(params: Any) -> Any:
    """Returns the same parameters, all of them floats."""
    return jax.tree.map(
        lambda leaf: leaf.floats() if _is_quantized(leaf) else leaf, params, is_leaf=_is_quantized
    )


def in_dtype(params: Any, dtype: Any) -> Any:
    """Returns the same parameters, cast to `dtype` where they are not int8."""
    return jax.tree.map(
        lambda leaf: leaf if _is_quantized(leaf) else leaf.astype(dtype),
        params,
        is_leaf=_is_quantized,
    )


def saved_shapes(task: Task, config: Config) -> Any:
    """Returns shapes and types of the parameters in a run's checkpoints, boxed with axis names.

    A run of int8 weights says so in its config (`quantized`).

    Raises:
      ValueError: the run has int8 activations and qwix is not installed.
    """
    if "quantized" not in config:
        return task.abstract_params()
    activations = str(config.quantized.activations)
    if activations:
        need_qwix()
    # At first those that choose became int8, too.
    boxed, axes = trace(task, (Choosing,) if "choosing" in config.quantized else ())

    def one(path: Any, box: Any) -> Any:
        contracted = axes.get(path_of(path))
        if contracted is None:
            return box
        shape, names = list(box.value.shape), list(box.names)
        values = box.replace(value=jax.ShapeDtypeStruct(tuple(shape), jnp.int8))
        for axis in contracted:
            shape[axis], names[axis] = 1, None
        scale = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        return Quantized(values, box.replace(value=scale, names=tuple(names)), activations)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)


def weight_bytes(params: Any) -> dict[str, int]:
    """Returns the bytes of a tree: of `all` leaves, and of `int8` ones (without their scales)."""
    leaves = jax.tree.leaves(params)
    sizes = [int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
    int8 = [size for size, leaf in zip(sizes, leaves, strict=True) if leaf.dtype == jnp.int8]
    return {"all": sum(sizes), "int8": sum(int8)}


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
