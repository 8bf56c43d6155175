"""One table from logical axes to mesh axes, and the shardings that follow from it.

| axis | divides | what is sent |
| --- | --- | --- |
| `data` | the batch | gradients |
| `fsdp` | the batch, and what `mesh.zero` says | parameters, gradients |
| `tensor` | heads, feed-forward, vocabulary | activations |
| `sequence` | tokens outside attention, heads within it | one exchange each way |
| `expert` | the batch, and experts within their layers | tokens, to their experts and back |
| `stage` | layers, in a pipeline of micro-batches | one stage's output to the next |

`mesh.zero` is 1 for optimizer state, 2 for gradients too, 3 for parameters too. Contrast is always
among the whole global batch: over devices, in `train.micro_batches` (embeddings first, then each
part again; exact), and in blocks of `objectives.contrastive.chunk` columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Axis = str | tuple[str, ...] | None

# Logical axis -> mesh axis or axes. Every name that a parameter or an activation bears is here.
RULES: dict[str, Axis] = {
    # parameters
    "layers": "stage",
    "embed": "fsdp",
    "heads": "tensor",
    "key_value_heads": None,  # fewer than the queries': few enough to keep whole
    "feed_forward": "tensor",
    "experts": "expert",
    "vocabulary": ("stage", "tensor"),  # what is outside the stages is shared by them all
    # activations
    "batch": ("data", "fsdp", "expert"),
    "expert_groups": ("data", "fsdp"),  # of tokens, at their experts
    "length": "sequence",
    # Within attention a device has whole sequences and fewer heads (Jacobs et al. 2023, Ulysses).
    "attending_heads": ("sequence", "tensor"),
    "stages": "stage",
    "activation": None,
}
BATCH = P(("data", "fsdp", "expert"))
BATCH_AXES = " x ".join(f"mesh.{axis}" for axis in BATCH[0])  # as messages say it
# What ZeRO divides along `fsdp`, by stage (Rajbhandari et al. 2020, section 5).
ZERO_STAGES = {1: ("moments",), 2: ("moments", "gradients"), 3: ("moments", "gradients", "params")}


def rule_items() -> list[tuple[str, Any]]:
    """Returns the table in Flax's form, for training."""
    return list(RULES.items())


def serving_rules() -> list[tuple[str, Any]]:
    """Returns the table for inference, where sequences grow by tokens and are not divided."""
    return list((RULES | {"length": None}).items())


def constrain(x: Any, *names: str | None) -> Any:
    """Constrains the sharding of x by the logical names of its axes; returns x.

    Nothing is constrained where no mesh or no table is set.

    Raises:
      ValueError: if the mesh does not divide an axis (GSPMD would pad it silently).
    """
    mesh = jax.sharding.get_abstract_mesh()
    table = dict(nn.get_logical_axis_rules())
    if table and not mesh.empty:
        for size, name in zip(x.shape, names, strict=True):
            check_divided(f"activations of shape {x.shape}", name, size, mesh, table)
    return nn.with_logical_constraint(x, names)


def check_divided(
    where: str, name: str | None, size: int, mesh: Any, table: Mapping[str, Axis]
) -> Axis:
    """Returns the mesh axis or axes that a logical axis is divided along.

    Raises:
      ValueError: if no rule covers the axis, or the mesh does not divide it; the message names
        `where`.
    """
    if name is None:
        return None
    if name not in table:
        raise ValueError(f"{where}: no rule covers axis {name!r}; there are {list(table)}")
    axes = _as_tuple(table[name])
    count = math.prod(mesh.shape[axis] for axis in axes)
    if size % count:
        shape = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
        raise ValueError(
            f"{where}: axis {name!r} of size {size} is not divided by {shape}; choose another "
            "mesh or another size"
        )
    return table[name]


def path_of(key_path: Any) -> str:
    """Returns a key path such as `('params', 'text', 'tokens')` as `params/text/tokens`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in key_path)


def shardings_of(abstract: Any, mesh: Mesh, table: Mapping[str, Axis] = RULES) -> Any:
    """Returns a sharding for each leaf of a tree whose arrays carry logical axis names.

    Args:
      abstract: tree from `jax.eval_shape`; matrices and vectors are boxed by
        `nn.with_logical_partitioning`, scalars and keys need no box.
      mesh: mesh with the axes of `parallel.mesh`.
      table: mesh axes of each logical axis.

    Raises:
      ValueError: if a parameter has no axis names, no rule covers an axis, or the mesh does not
        divide it; the message names the leaf.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        where = path_of(path)
        boxed = _is_box(leaf)
        value = leaf.value if boxed else leaf
        if not boxed:
            if value.ndim:
                raise ValueError(f"{where}: an array of shape {value.shape} has no axis names")
            return NamedSharding(mesh, P())
        axes = [
            check_divided(where, name, size, mesh, table)
            for size, name in zip(value.shape, leaf.names, strict=True)
        ]
        if "embed" in leaf.names and "layers" not in leaf.names:
            place = leaf.names.index("embed")
            axes[place] = _spread(axes, place, value.shape[place], mesh)
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=_is_box)


def _spread(axes: Sequence[Axis], place: int, size: int, mesh: Mesh) -> Axis:
    """Returns the mesh axes that divide the width of a parameter outside the stacks.

    Stages and tensor parallelism divide the stacks, but would keep a whole copy of what comes
    before and after them. So its width is divided along these axes too, where they divide it, and
    gathered where it is read, as with `fsdp`.
    """
    used = {axis for each in axes for axis in _as_tuple(each)}
    found = list(_as_tuple(axes[place]))
    for axis in ("stage", "tensor"):
        count = math.prod(mesh.shape[each] for each in (*found, axis))
        if axis not in used and size % count == 0:
            found.append(axis)
    return tuple(found) if len(found) > 1 else next(iter(found), None)


@dataclass(frozen=True)
class ParamShardings:
    """The shardings of parameters, and of what training keeps beside each of them.

    Attributes:
      mesh: mesh of all shardings.
      params: shardings of the parameters, a tree of the same structure.
      gradients: shardings of the gradients, such a tree too.
      moments: shardings of the optimizer's copies and the moving average, such a tree too.
      names: the logical axis names of each parameter, by its path.
    """

    names: Mapping[str, tuple[str | None, ...]]
    mesh: Mesh
    params: Any
    gradients: Any
    moments: Any


def param_shardings(abstract: Any, mesh: Mesh, zero: int = 3) -> ParamShardings:
    """Returns the shardings of a tree of boxed parameters, by the table and a stage of ZeRO.

    Args:
      abstract: tree of parameters, as for `shardings_of`.
      mesh: mesh that they are divided over.
      zero: stage of ZeRO: 1 divides optimizer state along `fsdp`, 2 gradients too, 3 parameters
        too.

    Raises:
      ValueError: if there is no such stage, or `shardings_of` raises it.
    """
    if zero not in ZERO_STAGES:
        raise ValueError(f"mesh.zero={zero}: must be one of {', '.join(map(str, ZERO_STAGES))}")
    divided = shardings_of(abstract, mesh)
    whole = shardings_of(abstract, mesh, RULES | {"embed": None})
    kinds = ("params", "gradients", "moments")
    trees = {kind: divided if kind in ZERO_STAGES[zero] else whole for kind in kinds}
    return ParamShardings(axis_names(abstract), mesh, **trees)


def axis_names(abstract: Any) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axis names of each boxed parameter, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract, is_leaf=_is_box)
    return {path_of(path): tuple(leaf.names) for path, leaf in leaves if _is_box(leaf)}


def shardings_like(params: Any, shardings: Any, tree: Any, otherwise: NamedSharding) -> Any:
    """Returns a sharding for each leaf of `tree`, which holds copies of `params` among others.

    A leaf is such a copy (a moment of the optimizer, for example) where its path ends in the path
    of a parameter of the same shape; it gets that parameter's of `shardings`. Any other leaf gets
    `otherwise`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        (path, leaf.shape): sharding
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def one(path: Any, leaf: Any) -> NamedSharding:
        tails = ((path[start:], leaf.shape) for start in range(len(path)))
        return next((known[tail] for tail in tails if tail in known), otherwise)

    return jax.tree_util.tree_map_with_path(one, tree)


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of one device's share of abstract arrays that have shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def without_names(tree: Any) -> Any:
    """Returns the tree with bare arrays (or shapes) instead of boxes with axis names."""
    return jax.tree.map(lambda leaf: leaf.value if _is_box(leaf) else leaf, tree, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _as_tuple(axis: Axis) -> tuple[str, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def into_parts(x: Any, parts: int, together: int = 1) -> Any:
    """Splits [B, ...] into [parts, B / parts, ...]; each part has rows of every device.

    Groups of `together` neighbouring rows stay in one part, as neighbours.
    """
    rows, rest = x.shape[0], x.shape[1:]
    dealt = x.reshape(rows // (parts * together), parts, together, *rest).swapaxes(0, 1)
    return dealt.reshape(parts, rows // parts, *rest)


def from_parts(x: Any, together: int = 1) -> Any:
    """Inverts `into_parts`."""
    (parts, rows), rest = x.shape[:2], x.shape[2:]
    dealt = x.reshape(parts, rows // together, together, *rest).swapaxes(0, 1)
    return dealt.reshape(parts * rows, *rest)


def batch_shards(mesh: Mesh) -> int:
    """Returns how many parts the mesh divides a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH[0])


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Returns device arrays of the global batch [B, ...], from this process's rows [rows, ...]."""
    rows = jax.tree.map(np.asarray, batch)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), rows)
