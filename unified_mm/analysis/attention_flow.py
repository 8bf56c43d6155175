"""Attention between modalities, by layer and head, and its rollout over layers.

Attention is no explanation of what a model does: see `unified_mm.analysis.attention_maps`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from unified_mm.analysis.attention_maps import patch_grid
from unified_mm.inference.loaded import LoadedModel
from unified_mm.nn.sow import Weights
from unified_mm.nn.tokens import spans


def shares(
    weights: Weights, query: str, key: str, counted: Bool[np.ndarray, "B T"] | None = None
) -> Float[np.ndarray, "L H"]:
    """Returns the share of their attention that tokens of one group give to those of another.

    It is the mean over the batch and over the group's tokens that see anything.

    Args:
      weights: the weights of one path, with values [L, B, H, Q, K].
      query, key: names of token groups.
      counted: which tokens of the query group count, such as those that are not padding; None
        for all.

    Raises:
      ValueError: a group is not among the queries or keys of the weights.
    """
    rows = _where(weights, query, "queries")
    columns = _where(weights, key, "keys")
    values = np.asarray(weights.values, np.float64)[..., rows, :]
    counts = values.sum(-1) > 0  # [L, B, H, T]
    if counted is not None:
        counts &= counted[None, :, None]
    given = np.where(counts, values[..., columns].sum(-1), 0.0)
    return given.sum((1, 3)) / np.maximum(counts.sum((1, 3)), 1)


def _where(weights: Weights, name: str, side: str) -> slice:
    found = spans(getattr(weights, side))
    if name not in found:
        raise ValueError(f"no token group {name!r} among the {side}: {', '.join(found)}")
    return found[name]


def stack_layers(
    weights: Mapping[str, Weights], stack: str = "transformer"
) -> Float[np.ndarray, "L B H N N"]:
    """Returns the self-attention weights of a stack, in the order of its layers.

    Layer l is block l % n of period l // n; gated cross-attention layers are left out.

    Raises:
      ValueError: there is no such stack.
    """
    pattern = re.compile(rf"{re.escape(stack)}/layers/block_(\d+)/attention")
    blocks = {int(m[1]): weights[m[0]] for path in weights if (m := pattern.fullmatch(path))}
    if not blocks:
        raise ValueError(f"no self-attention of {stack!r} among {', '.join(weights) or 'nothing'}")
    by_block = np.stack([np.asarray(blocks[number].values) for number in sorted(blocks)], axis=1)
    return by_block.reshape(-1, *by_block.shape[2:])


def rollout(layers: Float[np.ndarray, "L B H N N"]) -> Float[np.ndarray, "B N N"]:
    """Returns how much of each input token is in each output token, if only attention mixed them.

    Abnar & Zuidema 2020, "Quantifying attention flow in transformers", section 3: heads are
    averaged, half of each token stays where it is (the residual connection), and the layers are
    multiplied. A row sums to 1; a token that sees nothing stays itself.
    """
    count = layers.shape[-1]
    flow = np.broadcast_to(np.eye(count), (layers.shape[1], count, count))
    for layer in np.asarray(layers, np.float64):
        mixed = layer.mean(1) + np.eye(count)
        flow = mixed / mixed.sum(-1, keepdims=True) @ flow
    return flow


def between_modalities(
    weights: Mapping[str, Weights],
    groups: Sequence[str],
    counted: Mapping[str, Bool[np.ndarray, "B T"]],
    stack: str = "transformer",
) -> dict[str, Float[np.ndarray, "L H"]]:
    """Returns `shares` of every pair of groups in a stack's self-attention, as 'QUERY to KEY'.

    Args:
      weights: the weights of all attention layers, by path.
      groups: names of token groups.
      counted: for each query group, which of its tokens count; all where it is missing.
      stack: name of the stack.
    """
    layers = stack_layers(weights, stack)
    of_one = weights[f"{stack}/layers/block_0/attention"]
    whole = Weights(layers, of_one.queries, of_one.keys)
    return {
        f"{query} to {key}": shares(whole, query, key, counted.get(query))
        for query in groups
        for key in groups
    }


def rollout_over_picture(
    model: LoadedModel, flow: Float[np.ndarray, "N N"], valid: Bool[np.ndarray, " T"]
) -> tuple[list[str], Float[np.ndarray, "3 rows cols"]]:
    """Returns how much of each image patch is in the first, middle and last text token.

    Args:
      model: an early-fusion model.
      flow: the `rollout` of one example, its text last and its image before that.
      valid: which text tokens are not padding.

    Returns:
      The names of the tokens, and for each a map over the image's patches from its upper left.
    """
    down, across = patch_grid(model)
    places = np.flatnonzero(valid)
    chosen = places[[0, len(places) // 2, -1]]
    text = flow.shape[0] - len(valid)
    looks = flow[text + chosen, text - down * across : text]
    names = [f"token {place}" for place in chosen.tolist()]
    return names, looks.reshape(-1, down, across)
