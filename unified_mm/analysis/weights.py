"""Parameters of a checkpoint: norms, spectra, and the changes between two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.quantized_params import dequantized, trace
from unified_mm.nn.unstack import LAYERS
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder

ByPath = dict[str, Float[np.ndarray, "_ ..."]]  # the first axis is L


def kept_steps(run: str) -> tuple[int, ...]:
    """Returns the steps whose checkpoints a run keeps, oldest first, for `unified_mm.load`."""
    with Checkpoints(RunFolder(run).checkpoints, read_only=True) as checkpoints:
        return checkpoints.steps()


def arrays_by_path(params: Any) -> ByPath:
    """Returns every parameter as float64 [L, ...], int8 ones dequantized.

    The paths are those of the parameter tree. A parameter of a stack has the L layers first; one
    outside a stack has L = 1.
    """
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(dequantized(params)):
        path = path_of(key_path)
        array = np.asarray(leaf, np.float64)
        found[path] = array if in_stack(path) else array[None]
    return found


def in_stack(path: str) -> bool:
    """Returns whether a parameter's first axis is the layers of a stack."""
    return LAYERS in path.split("/")


def norms(arrays: ByPath) -> dict[str, Float[np.ndarray, " _"]]:
    """Returns Euclidean norms (of a matrix: Frobenius norms), by path and layer."""
    return {path: _norm(array) for path, array in arrays.items()}


def matrices(model: LoadedModel) -> dict[str, Float[np.ndarray, "_ _ _"]]:
    """Returns every dense kernel and embedding table as matrices, by path and layer.

    Axes that a product contracts come first: a projection into heads [D, H, A] is [D, H * A], one
    out of them [H * A, D], and a table [V, D] is [D, V], as for the scores of the next token.

    Returns:
      float64 [L, rows, columns] by path.
    """
    arrays = arrays_by_path(model.params)
    _, contracted = trace(model.task)
    return {
        path: as_matrices(arrays[path], axes)
        for path, axes in contracted.items()
        if path in arrays  # a table may serve for both ends of the text
    }


def as_matrices(
    array: Float[np.ndarray, "L ..."], contracted: tuple[int, ...]
) -> Float[np.ndarray, "L rows columns"]:
    """Returns arrays [L, ...] as matrices whose rows are the `contracted` (negative) axes."""
    inner = [axis % array.ndim for axis in contracted]
    outer = [axis for axis in range(1, array.ndim) if axis not in inner]
    size = int(np.prod([array.shape[axis] for axis in inner]))
    return array.transpose(0, *inner, *outer).reshape(len(array), size, -1)


def spectra(
    matrices: Mapping[str, Float[np.ndarray, "_ _ _"]],
) -> dict[str, Float[np.ndarray, "_ _"]]:
    """Returns the singular values [L, rank] of each matrix, largest first, by path and layer."""
    return {path: np.linalg.svd(each, compute_uv=False) for path, each in matrices.items()}


def stable_rank(singular_values: Float[np.ndarray, "L rank"]) -> Float[np.ndarray, " L"]:
    """Returns the squared Frobenius norm over the squared largest singular value.

    Rudelson & Vershynin 2007, "Sampling from large matrices", section 1. It is at most the rank,
    and 0 where the matrix is 0.
    """
    squares = np.square(singular_values)
    return squares.sum(-1) / np.maximum(squares.max(-1), np.finfo(np.float64).tiny)


def moved(before: ByPath, after: ByPath) -> dict[str, Float[np.ndarray, " _"]]:
    """Returns how far each parameter moved between two checkpoints, relative to its norm before.

    Where it was 0 before, this is infinite, or 0 if it still is.

    Raises:
      ValueError: the parameters are of two different models.
    """
    if before.keys() != after.keys():
        other = sorted(before.keys() ^ after.keys())
        raise ValueError(f"these are two models: only one of them has {', '.join(other[:5])}")
    found = {}
    for path, array in before.items():
        if array.shape != after[path].shape:
            raise ValueError(
                f"these are two models: {path} is {list(array.shape)} in one and "
                f"{list(after[path].shape)} in the other"
            )
        way, size = _norm(after[path] - array), _norm(array)
        still = np.where(way > 0, np.inf, 0.0)
        found[path] = np.where(size > 0, way / np.where(size > 0, size, 1), still)
    return found


def _norm(array: Float[np.ndarray, "L ..."]) -> Float[np.ndarray, " L"]:
    return np.sqrt(np.square(array).reshape(len(array), -1).sum(1))
