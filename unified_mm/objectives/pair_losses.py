"""Losses over all pairs of a batch, worked off in blocks of columns.

No more than B x `chunk` similarities are there at once: a block is compared, reduced to what its
rows need, and computed again for the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from unified_mm.parallel.sharding import constrain

SOFTMAX_START = 2.6593  # ln(1 / 0.07), CLIP
SIGMOID_START = (2.3026, -10.0)  # ln 10 and the bias, SigLIP
# Logit of pairs that do not count: far below any similarity, yet finite: no gradient is NaN.
NOWHERE = -1e9


@struct.dataclass
class Rows:
    """The running values of each row over the columns so far.

    Attributes:
      loss: [B]; for softmax the log of the summed exponentials, for sigmoid the summed losses.
      best: [B], the largest logit.
      best_column: int32 [B], the column of that logit.
    """

    loss: Float[Array, " B"]
    best: Float[Array, " B"]
    best_column: Int[Array, " B"]


@struct.dataclass
class Columns:
    """A block of columns.

    Attributes:
      vectors: [columns, Z].
      paired: bool [columns], whether a column counts.
      number: int32 [columns], number of the row that a column belongs to.
      own: [columns], logit of a column and that row.
      items: int32 [columns, ...] each, as `compare_all` has them.
    """

    vectors: Array
    paired: Array
    number: Array
    own: Array
    items: tuple[Array, ...] = ()


def compare_all(
    rows: Float[Array, "B Z"],
    columns: Float[Array, "B Z"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    paired: Bool[Array, " B"],
    *,
    loss: PairLoss,
    chunk: int = 0,
    items: Sequence[Int[Array, "B ..."]] = (),
    foils: tuple[Float[Array, "B Z"], Bool[Array, " B"]] | None = None,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Compares each row with every column; the column of the row's own number is the right one.

    Args:
      rows, columns: unit vectors, for example of images and of texts.
      scale, bias: of the logits `scale * rows @ columns.T + bias`.
      paired: the numbers whose row and column both count.
      loss: how they are compared.
      chunk: the most columns at a time (lowered to a divisor of B); 0 takes all at once.
      items: numbers of what each example is of; a row and a column that are equal in one of these
        arrays are no negatives of each other.
      foils: a negative of each row alone, and whether there is one; None without any.

    Returns:
      The loss of each number, and whether its row is nearest to its own of all columns.
    """
    count = rows.shape[0]
    size = largest_divisor(count, chunk or count)
    # Vectors are small: every device has all columns, and its own rows.
    columns = constrain(columns, None, None)
    items = tuple(items)
    own = scale * (rows * columns).sum(-1) + bias
    first = jnp.full(count, loss.start, jnp.float32)
    if foils is not None:
        false, there = foils
        of_foils = loss.foil(scale * (rows * false).sum(-1) + bias)  # type: ignore[misc]
        first = jnp.where(paired & there, of_foils, first)
    start = Rows(
        loss=first,
        best=jnp.full(count, -jnp.inf),
        best_column=jnp.full(count, -1, jnp.int32),
    )

    def add(seen: Rows, block: Columns) -> tuple[Rows, Float[Array, " columns"]]:
        logits = scale * jnp.einsum("BZ,CZ->BC", rows, block.vectors) + bias
        if items:
            own = jnp.arange(count)[:, None] == block.number[None, :]
            alike = [equal_rows(one, other) for one, other in zip(items, block.items, strict=True)]
            # So low a logit is no competitor, and adds no loss.
            logits = jnp.where(functools.reduce(jnp.logical_or, alike) & ~own, NOWHERE, logits)
        added, of_columns = loss.part(seen.loss, logits, paired, block)
        # The largest logit and its column so far, the first of equals, without gradient.
        there = jax.lax.stop_gradient(jnp.where(block.paired[None, :], logits, -jnp.inf))
        best = there.max(1)
        better = best > seen.best
        column = jnp.where(better, block.number[there.argmax(1)], seen.best_column)
        return Rows(added, jnp.where(better, best, seen.best), column), of_columns

    everywhere = tuple(constrain(each, *[None] * each.ndim) for each in items)
    whole = Columns(columns, paired, jnp.arange(count), own, everywhere)
    if size == count:
        seen, of_columns = add(start, whole)
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), whole)
        seen, of_columns = jax.lax.scan(jax.checkpoint(add), start, blocks)
        of_columns = of_columns.reshape(count)
    right = seen.best_column == jnp.arange(count)
    return loss.finish(seen.loss, jnp.where(paired, own, NOWHERE), of_columns), right


def equal_rows(one: Int[Array, "B ..."], other: Int[Array, "C ..."]) -> Bool[Array, "B C"]:
    """Returns which rows of two integer arrays are equal in all that they hold."""
    same: Array = one[:, None] == other[None, :]
    return same.all(tuple(range(2, same.ndim)))


def softmax_part(
    seen: Float[Array, " B"],
    logits: Float[Array, "B columns"],
    paired: Bool[Array, " B"],
    block: Columns,
) -> tuple[Float[Array, " B"], Float[Array, " columns"]]:
    """Returns the rows' running log-sum-exp, and each column's cross-entropy over all rows."""
    masked = jnp.where(paired[:, None] & block.paired[None, :], logits, NOWHERE)
    own = jnp.where(block.paired, block.own, NOWHERE)
    of_columns = jax.nn.logsumexp(masked, axis=0) - own
    return jnp.logaddexp(seen, jax.nn.logsumexp(masked, axis=1)), of_columns


def sigmoid_part(
    seen: Float[Array, " B"],
    logits: Float[Array, "B columns"],
    paired: Bool[Array, " B"],
    block: Columns,
) -> tuple[Float[Array, " B"], Float[Array, " columns"]]:
    """Adds -log sigmoid(z x) to the rows, with z = 1 for a row and its own column, else -1."""
    together = jnp.arange(logits.shape[0])[:, None] == block.number[None, :]
    losses = -jax.nn.log_sigmoid(jnp.where(together, logits, -logits))
    both = paired[:, None] & block.paired[None, :]
    return seen + jnp.where(both, losses, 0.0).sum(1), jnp.zeros_like(block.own)


@dataclass(frozen=True)
class PairLoss:
    """A loss over all pairs of a batch, computed in blocks of columns.

    Attributes:
      start: initial running value of each row.
      part: (running values [B], logits [B, columns], rows that count [B], the block) -> the next
        running values [B], and values of the block's columns [columns].
      finish: (running values, each row's own logit, values of columns), each [B] -> the loss [B].
      log_scale: initial log of the logits' scale.
      bias: initial bias of the logits; None for a loss without a bias.
      foil: logits [B] of negatives of one row each -> the initial running values of these rows;
        None for a loss that takes no foils.
    """

    start: float
    part: Callable[..., tuple[Array, Array]]
    finish: Callable[[Array, Array, Array], Array]
    log_scale: float
    bias: float | None = None
    foil: Callable[[Array], Array] | None = None


LOSSES = {
    # Radford et al. 2021, figure 3: the mean of both ways.
    "softmax": PairLoss(
        -float("inf"),
        softmax_part,
        lambda rows, own, columns: 0.5 * (rows - own + columns),
        SOFTMAX_START,
        foil=lambda logits: logits,
    ),
    # Zhai et al. 2023, equation 1, summed over a row.
    "sigmoid": PairLoss(
        0.0,
        sigmoid_part,
        lambda rows, own, columns: rows,
        *SIGMOID_START,
        foil=lambda logits: -jax.nn.log_sigmoid(-logits),
    ),
}


def largest_divisor(count: int, most: int) -> int:
    """Returns the largest divisor of `count` that is at most `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)
