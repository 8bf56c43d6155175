"""Muon for the matrices within layers, Adam for all else."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from unified_mm.parallel.sharding import path_of

# Kernels of stacked layers [periods, ...] -> which of their axes go in and which come out.
MATRICES = (
    (r".*layers/.*/(query|key|value)(/\w+)?/kernel", MuonDimensionNumbers((1,), (2, 3))),
    (r".*layers/.*/output(/\w+)?/kernel", MuonDimensionNumbers((1, 2), (3,))),
    (r".*layers/.*/(up|gate|down)/kernel", MuonDimensionNumbers((1,), (2,))),
)
MOMENTUM = 0.95
# Root mean square of an update, about that of Adam's, so that its rates and decay hold for both
# (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
RMS = 0.2


def scale_by_muon_or(
    adam: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
    """Returns orthogonalised momentum for matrices (Jordan et al. 2024), `adam` for the others.

    Args:
      adam: for what is no matrix within a layer: embeddings, heads, norms, biases.
      params: the tree, or its shapes, whose paths say what is one.

    Raises:
      ValueError: no parameter is such a matrix.
    """
    axes = jax.tree_util.tree_map_with_path(lambda path, leaf: matrix_axes(path_of(path)), params)
    kinds = jax.tree.map(
        lambda found: "adam" if found is None else "muon", axes, is_leaf=is_axes_or_none
    )
    if "muon" not in jax.tree.leaves(kinds):
        raise ValueError("train.optimizer='muon': no parameter is a matrix within a layer")
    return optax.partition({"muon": of_matrices(), "adam": adam}, kinds)


def of_matrices() -> optax.GradientTransformation:
    """Returns Muon's scaling for a tree whose leaves are all such matrices."""

    def axes(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: matrix_axes(path_of(path)), tree)

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(sized, updates)

    muon = scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=axes)
    return optax.chain(muon, optax.stateless(scaled))


def sized(path: Any, update: Any) -> Any:
    """Scales an orthogonal update to the root mean square `RMS`."""
    axes = matrix_axes(path_of(path))
    assert axes is not None
    sides = (axes.reduction_axis, axes.output_axis)
    longer = max(math.prod(update.shape[axis] for axis in side) for side in sides)
    return RMS * math.sqrt(longer) * update


def matrix_axes(path: str) -> Any:
    """Returns which axes go in and come out of a matrix within a layer; None for other leaves."""
    for pattern, axes in MATRICES:
        if re.fullmatch(pattern, path):
            return axes
    return None


def is_axes_or_none(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)
