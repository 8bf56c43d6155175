"""The cost of a config, before any data is read: parameters and floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from ml_collections import ConfigDict

from unified_mm.config import Config
from unified_mm.costs.flops import matmul_flops
from unified_mm.data.text_tokenizer import BOS, EOS, PAD, TextTokenizer
from unified_mm.nn.tokens import POSITION_KEYS
from unified_mm.objectives.captioning import Captioning
from unified_mm.parallel.sharding import axis_names, path_of, without_names
from unified_mm.task import Task, build_task, parameter_counts

ROWS = 8  # examples that FLOPs are counted on
BY = ("width", "layers")


@dataclass(frozen=True)
class Sizes:
    """The cost of one model; FLOPs are of products and convolutions, a multiply-add being two.

    Attributes:
      parameters: number of parameters by part.
      active: parameters that a token goes through: of the experts of a pool, as many as it has.
      training_flops: FLOPs of an example, forward and backward.
      token_flops: FLOPs of one generated token at the end of a text, None where none can be
        written.
    """

    parameters: Mapping[str, int]
    active: int
    training_flops: int
    token_flops: int | None

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def measure_sizes(config: Config) -> Sizes:
    """Measures the cost of a config, with a tokenizer as large as it may become.

    Raises:
      ValueError: a config that no task can be built of.
    """
    task, params = shapes_of(config)
    return Sizes(
        parameters=parameter_counts(params),
        active=active_parameters(task, params),
        training_flops=3 * forward_flops(task, params) // ROWS,
        token_flops=token_flops(task, params),
    )


def shapes_of(config: Config) -> tuple[Task, Any]:
    """Returns a config's task, and its parameters' shapes."""
    task = build_task(config, stand_in_for(config))
    task = replace(task, model=task.model.without_recomputation())
    return task, without_names(jax.eval_shape(task.init, jax.random.key(0)))


def active_parameters(task: Task, params: Any) -> int:
    """Counts the parameters that a token goes through: K of the E experts of each pool."""
    names = axis_names(task.abstract_params())

    def one(path: str, size: int) -> int:
        if "experts" not in names.get(path, ()):
            return size
        own = task.model.stacks[path.split("/")[0]].own
        return size * own("top_k", 1) // own("count", 1)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(one(path_of(path), math.prod(leaf.shape)) for path, leaf in leaves)


def forward_flops(task: Task, params: Any) -> int:
    """Counts the FLOPs of all objectives on `ROWS` examples, forward, with the room of training."""
    together = task.model.together
    rows = math.lcm(ROWS, together)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, task.example_batch(rows)))
    counted = matmul_flops(
        lambda params, batch, key: task.metrics(params, batch, key, deterministic=False),
        params,
        batch,
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return counted * ROWS // rows


def token_flops(task: Task, params: Any) -> int | None:
    """Counts the FLOPs of one more token beside a cache of the context and a whole text.

    Returns None where no objective writes text.
    """
    writing = [each for each in task.objectives if isinstance(each, Captioning)]
    if not writing:
        return None
    view, model = writing[0].view, task.model.for_inference()
    length = task.modalities["text"].length

    def prefill(params: Any, batch: Any) -> Any:
        return model.apply({"params": params}, batch, view, length, method="prefill")

    def extend(params: Any, cache: Any, text: Any) -> Any:
        def one(model: Any) -> Any:
            x, extended = model.extend(cache, text, view)
            return model.logits(x), extended

        return model.apply({"params": params}, method=one)

    batch: Any = jax.tree.map(jnp.asarray, task.example_batch(1))
    kept = ("ids", "valid", "present", "text_position", *POSITION_KEYS)
    first = {key: value for key, value in batch["text"].items() if key in kept}
    start = {key: value[:, :1] if value.ndim > 1 else value for key, value in first.items()}
    cache = jax.eval_shape(prefill, params, {**batch, "text": start})[1]
    return matmul_flops(extend, params, cache, start)


def stand_in_for(config: Config) -> TextTokenizer:
    """Returns a placeholder of a config's tokenizer, with that of its reader, if it has one."""
    found = stand_in_tokenizer(config.data.vocabulary_size)
    if config.model.reader:
        found.reader = stand_in_tokenizer(config.model.reader["text"]["vocabulary"])
    return found


def stand_in_tokenizer(size: int) -> TextTokenizer:
    """Returns a placeholder tokenizer of a given size."""
    names = [PAD, BOS, EOS, *(f"<{number}>" for number in range(3, size))]
    vocabulary = {name: number for number, name in enumerate(names)}
    return TextTokenizer(
        tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=PAD))
    )


def fit_to_budget(config: ConfigDict) -> ConfigDict:
    """Returns the config with the largest width or depth that `model.budget` allows.

    The feed-forward width grows in proportion to the width, the number of heads stays.

    Args:
      config: `model.budget` is in FLOPs a training example, 0 for none; `model.budget_by` is
        'width' or 'layers'.

    Raises:
      ValueError: an unknown `model.budget_by`, or a budget below the smallest model.
    """
    budget = config.model.budget
    if not budget:
        return config
    by = config.model.budget_by
    if by not in BY:
        raise ValueError(f"model.budget_by={by!r}: must be one of {', '.join(BY)}")
    model = config.model
    if by == "width":
        step = math.lcm(4, 2 * model.heads)  # whole, even heads; sines of two coordinates in fours
        first = 1
    else:
        gated = model.fusion == "gated_cross_attention"
        step = model.cross.every if gated else model.feed_forward_options.get("every", 1)
        # Layers come after each exit, and after the drop.
        after = model.dropping.after if model.dropping.keep < 1 else 0
        first = max(after, *model.exits, 0) // step + 1

    def resized(count: int) -> ConfigDict:
        other = ConfigDict(config.to_dict())
        if by == "width":
            other.model.width = step * count
            ratio = model.feed_forward / model.width
            other.model.feed_forward = max(1, round(ratio * step * count))
        else:
            other.model.layers = step * count
            other.model.unroll = 1
        return other

    @cache
    def cost(count: int) -> int:
        return 3 * forward_flops(*shapes_of(Config(resized(count).to_dict()))) // ROWS

    if cost(first) > budget:
        raise ValueError(
            f"model.budget={budget:.3g} FLOPs a training example: the smallest model by {by} costs "
            f"{cost(first):.3g}"
        )
    # FLOPs grow with the square of the width, or with depth, and by less where some do not grow:
    # a step by that law all but never goes too far.
    power = 1 / 2 if by == "width" else 1
    count = first
    while True:
        guess = int(count * (budget / cost(count)) ** power)
        if guess > count + 1 and cost(guess) <= budget:
            count = guess
        elif cost(count + 1) <= budget:
            count += 1
        else:
            return resized(count)
