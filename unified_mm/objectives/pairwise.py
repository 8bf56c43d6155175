"""Losses over all pairs of a batch, worked off in blocks of columns.

No more than B x `chunk` similarities are there at once: a block is compared, reduced to what its
rows need, and computed again for its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from unified_mm.parallel.sharding import constrain

# Of pairs that do not count: far below any similarity, and finite, so that no gradient is NaN.
NOWHERE = -1e9


@struct.dataclass
class Rows:
    """What the columns seen so far say of each row.

    Attributes:
      loss: [B]; for softmax the log of the summed exponentials, for sigmoid the summed losses.
      best: [B] the largest similarity, and `best_column` where it stands.
    """

    loss: Float[Array, " B"]
    best: Float[Array, " B"]
    best_column: Int[Array, " B"]


@struct.dataclass
class Columns:
    """A block of columns.

    Attributes:
      vectors: [C, E].
      paired: bool [C], whether it counts.
      number: int32 [C], of the row that it belongs to.
      own: [C], its similarity to that row.
    """

    vectors: Array
    paired: Array
    number: Array
    own: Array


def compare_all(
    rows: Float[Array, "B E"],
    columns: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    paired: Bool[Array, " B"],
    *,
    loss: str,
    chunk: int = 0,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Each row against every column, the one of its own number being right.

    Args:
      rows, columns: unit vectors, of images and of texts say.
      scale, bias: of the logits `scale * rows @ columns + bias`.
      paired: numbers whose row and column both count.
      loss: 'softmax' (Radford et al. 2021, figure 3, the mean of both ways) or 'sigmoid' (Zhai et
        al. 2023, equation 1, summed over a row).
      chunk: columns at a time, at most (it is lowered to a divisor of B); 0 takes all at once.

    Returns:
      The loss of each number, and whether its row is nearest to its own column.
    """
    count = rows.shape[0]
    size = largest_divisor(count, chunk or count)
    # Vectors are small: every device sees all columns, and keeps its own rows.
    columns = constrain(columns, None, None)
    own = scale * (rows * columns).sum(-1) + bias
    start = Rows(
        loss=jnp.full(count, -jnp.inf) if loss == "softmax" else jnp.zeros(count),
        best=jnp.full(count, -jnp.inf),
        best_column=jnp.full(count, -1, jnp.int32),
    )
    part = sigmoid_part if loss == "sigmoid" else softmax_part

    def add(seen: Rows, block: Columns) -> tuple[Rows, Float[Array, " C"]]:
        logits = scale * jnp.einsum("BE,CE->BC", rows, block.vectors) + bias
        loss, of_columns = part(seen.loss, logits, paired, block)
        best, best_column = nearer(seen, logits, block)
        return Rows(loss, best, best_column), of_columns

    whole = Columns(columns, paired, jnp.arange(count), own)
    if size == count:
        seen, of_columns = add(start, whole)
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), whole)
        seen, of_columns = jax.lax.scan(jax.checkpoint(add), start, blocks)
        of_columns = of_columns.reshape(count)
    right = seen.best_column == jnp.arange(count)
    if loss == "sigmoid":
        return seen.loss, right
    masked = jnp.where(paired, own, NOWHERE)
    return 0.5 * (seen.loss - masked + of_columns), right


def softmax_part(
    seen: Float[Array, " B"],
    logits: Float[Array, "B C"],
    paired: Bool[Array, " B"],
    block: Columns,
) -> tuple[Float[Array, " B"], Float[Array, " C"]]:
    """The rows' running log-sum-exp, and the cross-entropy of each column over all rows."""
    masked = jnp.where(paired[:, None] & block.paired[None, :], logits, NOWHERE)
    own = jnp.where(block.paired, block.own, NOWHERE)
    of_columns = jax.nn.logsumexp(masked, axis=0) - own
    return jnp.logaddexp(seen, jax.nn.logsumexp(masked, axis=1)), of_columns


def sigmoid_part(
    seen: Float[Array, " B"],
    logits: Float[Array, "B C"],
    paired: Bool[Array, " B"],
    block: Columns,
) -> tuple[Float[Array, " B"], Float[Array, " C"]]:
    """-log sigmoid(z x) added to the rows, z being +1 where row and column belong together."""
    together = jnp.arange(logits.shape[0])[:, None] == block.number[None, :]
    losses = -jax.nn.log_sigmoid(jnp.where(together, logits, -logits))
    both = paired[:, None] & block.paired[None, :]
    return seen + jnp.where(both, losses, 0.0).sum(1), jnp.zeros_like(block.own)


def nearer(
    seen: Rows, logits: Float[Array, "B C"], block: Columns
) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """The nearest column that counts so far; of equals the first. It has no gradient."""
    there = jax.lax.stop_gradient(jnp.where(block.paired[None, :], logits, -jnp.inf))
    best = there.max(1)
    better = best > seen.best
    column = block.number[there.argmax(1)]
    return jnp.where(better, best, seen.best), jnp.where(better, column, seen.best_column)


def largest_divisor(count: int, most: int) -> int:
    """The largest divisor of `count` that is at most `most`."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)
