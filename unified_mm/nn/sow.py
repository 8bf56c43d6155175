"""Attention weights, auxiliary values and the residual stream, sown on request.

`model.apply(..., mutable=["attention"])` asks for attention weights; models compute none otherwise.
Each attention then sows its `Weights` into the collection of that name, under its own path; in a
scanned stack they have a leading axis of periods. The same holds for 'auxiliary' and 'residual'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.masks import (
    BlockCall,
    BlockMask,
    block_bias,
    block_mask,
    slice_keys,
    widen,
)
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group
from unified_mm.nn.unstack import LAYERS, stack_layers
from unified_mm.parallel.sharding import path_of

ATTENTION = "attention"  # the collection


@struct.dataclass
class Weights:
    """The weights of an attention.

    Attributes:
      values: float32 [..., B, H, Q, K]; a row sums to 1, or to 0 where the query sees no key.
      queries, keys: the token groups along Q and K; static.
    """

    values: Any
    queries: tuple[Group, ...] = struct.field(pytree_node=False)
    keys: tuple[Group, ...] = struct.field(pytree_node=False)


def sow_attention(
    module: nn.Module,
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    calls: Sequence[BlockCall],
    masks: Sequence[BlockMask],
    groups: tuple[tuple[Group, ...], tuple[Group, ...]],
) -> None:
    """Sows the weights of an attention into the collection `ATTENTION`.

    They come from the reference softmax, whichever backend computed the attention.

    Args:
      module: the attention module.
      query, key: as its backend gets them, all Q and all K.
      calls, masks: its block calls, and the mask of each.
      groups: of the queries and of the keys.
    """
    rows, heads = query.shape[0], query.shape[2]
    values = jnp.zeros((rows, heads, query.shape[1], key.shape[1]), jnp.float32)
    for call, seen_by in zip(calls, masks, strict=True):
        mask, bias = seen_by.dense, seen_by.bias
        if mask is None:
            mask = block_mask(seen_by.call, seen_by.queries, seen_by.keys)
            bias = block_bias(seen_by.call, seen_by.queries, seen_by.keys)
        part = softmax_weights(query[:, slice(*call.queries)], slice_keys(key, call), mask, bias)
        done = 0
        for start, stop, *_ in call.keys:
            piece = part[..., done : done + stop - start]
            values = values.at[:, :, slice(*call.queries), start:stop].set(piece)
            done += stop - start
    module.sow(ATTENTION, "weights", Weights(values, *groups))


def by_path(left: Mapping[str, Any]) -> dict[str, Weights]:
    """Returns the weights sown into the collection, by path of the module.

    Their values are [periods, B, H, Q, K]; outside a stack, periods is 1.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        stack_layers(left), is_leaf=lambda leaf: isinstance(leaf, Weights)
    )
    # Flax keeps it under .../weights/0.
    found = {path_of(path[:-2]): weights for path, weights in leaves}
    return {
        path: weights if weights.values.ndim == 5 else jax.tree.map(lambda x: x[None], weights)
        for path, weights in found.items()
    }


def softmax_weights(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    mask: Bool[Array, "B Q K"],
    bias: Float[Array, "B Q K"] | None = None,
) -> Float[Array, "B H Q K"]:
    """Returns softmax(q k / sqrt(A) + bias) (Vaswani et al. 2017, eq. 1); zero under the mask."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    scores = jnp.einsum("BQHA,BKHA->BHQK", query, widen(key, query.shape[2]))
    scores = scores * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias[:, None]
    seen = mask[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.where(seen, weights, 0.0)


AUXILIARY = "auxiliary"  # the collection


def sow_auxiliary(module: nn.Module, name: str, x: Float[Array, "..."]) -> None:
    """Sows an auxiliary value of a layer, such as a load-balancing statistic, for objectives.

    Scans, recomputation, pipelines and micro-batches divide or join its first axis. So that
    statistics add up, that axis has a row for each example, or a fixed number of groups per
    example; one number for the whole batch is refused.

    Args:
      module: the layer.
      name: of the value; a call of the layer sows it once.
      x: the values, [groups, ...].

    Raises:
      ValueError: x is a scalar.
    """
    if jnp.ndim(x) == 0:
        raise ValueError(
            f"{name}: what a layer leaves has a row for each example or group, and is no scalar: "
            "where parts of a batch are joined, one number would not add up"
        )
    module.sow(AUXILIARY, name, x)


def auxiliary_left(module: nn.Module) -> dict[str, tuple[Array, ...]]:
    """Returns what the layers within a module have left so far, call by call, by path."""
    left = module.variables.get(AUXILIARY, {})
    found = jax.tree_util.tree_leaves_with_path(left, is_leaf=lambda x: isinstance(x, tuple))
    return {path_of(path): values for path, values in found}


def check_auxiliary(module: nn.Module, before: Mapping[str, Sequence[Array]], rows: int) -> None:
    """Checks that what layers have left since `before` has as many groups for each example.

    Args:
      module: that the layers are in.
      before: what `auxiliary_left` returned then.
      rows: how many examples the layers were run on.

    Raises:
      ValueError: this is not so; the message names the layer.
    """
    for path, values in auxiliary_left(module).items():
        for x in values[len(before.get(path, ())) :]:
            if x.shape[0] % rows or not x.shape[0]:
                raise ValueError(
                    f"{'/'.join((*module.path, path))}: the layer leaves values of shape {x.shape} "
                    f"for {rows} examples; their first axis must have a row for each example, or "
                    "the same number of groups for each"
                )


def auxiliary_by_path(left: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the auxiliary values in the collection, by path; of a stack, [periods, groups, ...].

    A path names the layer within a period.
    """
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(stack_layers(left)):
        found.setdefault(path_of(path[:-1]), []).append(leaf)  # Flax keeps it under .../name/0
    # A stack that runs more than once in a pass leaves groups each time.
    return {
        path: jnp.concatenate(leaves, axis=int(f"/{LAYERS}/" in path))
        for path, leaves in found.items()
    }


RESIDUAL = "residual"  # the collection
EMBEDDED = "embedded"


def layer_names(options: TransformerOptions) -> list[str]:
    """Returns the names of the residual streams that a stack sows, in order.

    They are 'embedded', then 'layer_0', 'layer_1', ...; that of a gated cross layer before the
    blocks of period p is 'cross_p'.
    """
    names = [EMBEDDED]
    for period in range(options.periods):
        if options.cross.every:
            names.append(f"cross_{period}")
        first = period * options.blocks_per_period
        names += [f"layer_{first + number}" for number in range(options.blocks_per_period)]
    return names


def streams_by_layer(
    left: Mapping[str, Any], stack: str, options: TransformerOptions
) -> dict[str, Float[Array, "B N D"]]:
    """Returns the residual streams that one stack sowed, by `layer_names`.

    Args:
      left: the collection.
      stack: name of the stack in the parameter tree: 'transformer', 'towers_image'.
      options: of the stack.
    """
    found = stack_layers({stack: left[stack]})[stack]
    streams = [found[EMBEDDED][0]]
    for period in range(options.periods):
        # A scan stacks what its periods sow: each has its own row. Flax keeps it in a tuple.
        if options.cross.every:
            streams.append(found[LAYERS]["after_cross"][0][period])
        for number in range(options.blocks_per_period):
            streams.append(found[LAYERS][f"after_block_{number}"][0][period])
    return dict(zip(layer_names(options), streams, strict=True))
