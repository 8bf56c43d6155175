"""One table from logical axes to mesh axes, and the shardings that follow from it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Logical axis -> mesh axis or axes. Every name that a parameter or an activation bears is here.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "key_value_heads": None,  # fewer than the queries': few enough to keep whole
    "feed_forward": "tensor",
    "vocabulary": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "activation": None,
}
BATCH = P(("data", "fsdp"))


def rule_items() -> list[tuple[str, Any]]:
    """The table as Flax wants it."""
    return list(RULES.items())


def path_of(key_path: Any) -> str:
    """`('params', 'text', 'tokens')` as `params/text/tokens`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in key_path)


def shardings_of(abstract: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of a tree whose arrays carry logical axis names.

    Args:
      abstract: from `jax.eval_shape`; matrices and vectors are boxed by
        `nn.with_logical_partitioning`, scalars and keys need no box.
      mesh: with the axes of `parallel.mesh`.

    Raises:
      ValueError: a parameter without axis names, an axis that no rule covers, or one that the mesh
        does not divide; each names the leaf.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        where = path_of(path)
        boxed = _is_box(leaf)
        value = leaf.value if boxed else leaf
        if not boxed:
            if value.ndim:
                raise ValueError(f"{where}: an array of shape {value.shape} has no axis names")
            return NamedSharding(mesh, P())
        axes = []
        for size, name in zip(value.shape, leaf.names, strict=True):
            if name is not None and name not in RULES:
                raise ValueError(f"{where}: no rule covers axis {name!r}; there are {list(RULES)}")
            axis = RULES[name] if name is not None else None
            count = int(np.prod([mesh.shape[a] for a in _as_tuple(axis)]))
            if size % count:
                raise ValueError(
                    f"{where}: axis {name!r} of size {size} is not divided by mesh axis {axis!r} "
                    f"of size {count}; choose another mesh.{axis} or another size"
                )
            axes.append(axis)
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=_is_box)


def shardings_like(params: Any, shardings: Any, tree: Any, otherwise: NamedSharding) -> Any:
    """A sharding for each leaf of `tree`, which holds copies of `params` among other things.

    A leaf is such a copy (a moment of the optimizer, say) where its path ends in the path of a
    parameter of the same shape; anything else gets `otherwise`.
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


def without_names(tree: Any) -> Any:
    """The same tree with bare arrays (or shapes) instead of boxes that bear axis names."""
    return jax.tree.map(
        lambda leaf: leaf.value if _is_box(leaf) else leaf, tree, is_leaf=_is_box
    )


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _as_tuple(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Host arrays of this process's rows [b, ...] as device arrays of the global batch [B, ...]."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )
