"""Muon for the matrices within layers, Adam for all else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from unified_mm.parallel.sharding import path_of

AxisNames = Mapping[str, Sequence[str | None]]  # path of a parameter -> its logical axis names

# The kernels within layers that are matrices, whatever stands around them.
MATRICES = r".*layers/.*/((query|key|value|output)(/\w+)?|up|gate|down)/kernel"
# What stands on the other side of a matrix than the model's width, `embed`.
HEADS = ("heads", "key_value_heads")
MOMENTUM = 0.95
# Root mean square of an update, about that of Adam's, so that its rates and decay hold for both
# (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
RMS = 0.2


def scale_by_muon_or(
    adam: optax.GradientTransformation, params: Any, names: AxisNames
) -> optax.GradientTransformation:
    """Returns orthogonalised momentum for matrices (Jordan et al. 2024), `adam` for the others.

    Args:
      adam: for what is no matrix within a layer: embeddings, heads, norms, biases.
      params: the tree, or its shapes, whose paths say what is one.
      names: the logical axis names of each parameter, by its path.

    Raises:
      ValueError: no parameter is such a matrix, or the axes of one cannot be told.
    """

    def axes(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: matrix_axes(path_of(path), names), tree
        )

    kinds = jax.tree.map(
        lambda found: "adam" if found is None else "muon", axes(params), is_leaf=is_axes_or_none
    )
    if "muon" not in jax.tree.leaves(kinds):
        raise ValueError("train.optimizer='muon': no parameter is a matrix within a layer")

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(sized, updates, axes(updates))

    muon = scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=axes)
    return optax.partition(
        {"muon": optax.chain(muon, optax.stateless(scaled)), "adam": adam}, kinds
    )


def sized(update: Any, axes: MuonDimensionNumbers) -> Any:
    """Scales an orthogonal update to the root mean square `RMS`."""
    sides = (axes.reduction_axis, axes.output_axis)
    longer = max(math.prod(update.shape[axis] for axis in side) for side in sides)
    return RMS * math.sqrt(longer) * update


def matrix_axes(path: str, names: AxisNames) -> Any:
    """Returns which axes go in and come out of a matrix within a layer; None for other leaves.

    Axes before both, such as layers and experts, hold matrices of their own.

    Raises:
      ValueError: the names of the axes do not tell.
    """
    if not re.fullmatch(MATRICES, path):
        return None
    axes = tuple(names.get(path, ()))
    wide = [place for place, name in enumerate(axes) if name in (*HEADS, "feed_forward")]
    if len(wide) == axes.count("embed") == 1:
        width, (first,) = (axes.index("embed"),), wide
        # Heads are followed by the width of each.
        other = (first, first + 1) if axes[first] in HEADS else (first,)
        sides = (width, other) if width < other else (other, width)
        if sides[0] + sides[1] == tuple(range(min(sides[0]), len(axes))):
            return MuonDimensionNumbers(*sides)
    raise ValueError(
        f"train.optimizer='muon': the axes of {path} are named {axes}, which does not tell which "
        "go in and which come out: name them by 'embed' and 'feed_forward', or 'heads' and None, "
        "the others first"
    )


def is_axes_or_none(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)
