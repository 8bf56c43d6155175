"""Contrast: an image and its text lie closer together than with the others of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import NONE, View
from unified_mm.nn.layers import Dense
from unified_mm.nn.pooling import AttentionPool, pool_of, pooled
from unified_mm.objectives.objective import (
    Embedded,
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
)
from unified_mm.parallel.sharding import constrain
from unified_mm.registry import resolve

MAX_LOG_SCALE = 4.6052  # ln 100: CLIP's bound, without which training can run away.
SOFTMAX_START = 2.6593  # ln(1 / 0.07), CLIP
SIGMOID_START = (2.3026, -10.0)  # ln 10 and the bias, SigLIP
PROJECTIONS = ("linear", "affine", "none")


@dataclass(frozen=True)
class Pooling:
    """How a modality's tokens become one vector of the shared space.

    Attributes:
      pool: the mean of them, the 'first' (a class token), the 'last' that is there, or 'attention'
        of a learned query (Zhai et al. 2022, "Scaling vision transformers", section 3.2).
      projection: 'linear', 'affine' (with a bias) or 'none'.
      heads, hidden: of the attention and the feed-forward that follows it.
    """

    pool: str
    projection: str
    heads: int
    hidden: int

    @classmethod
    def from_config(cls, field: str, options: Mapping[str, Any], prefix: str) -> Pooling:
        """From `config.objectives.<name>`, the keys `<prefix>pool` and `<prefix>projection`."""
        pool, projection = options[f"{prefix}pool"], options[f"{prefix}projection"]
        pool_of(pool, f"{field}.{prefix}pool")
        if projection not in PROJECTIONS:
            raise ValueError(
                f"{field}.{prefix}projection={projection!r}: must be one of "
                f"{', '.join(PROJECTIONS)}"
            )
        return cls(
            pool=str(options[f"{prefix}pool"]),
            projection=str(options[f"{prefix}projection"]),
            heads=int(options["pool_heads"]),
            hidden=int(options["pool_feed_forward"]),
        )


@dataclass(frozen=True)
class Contrastive(TextObjective):
    """InfoNCE both ways (Radford et al. 2021, figure 3) or sigmoid pairs (Zhai et al. 2023, eq. 1).

    Attributes:
      loss: 'softmax' or 'sigmoid'.
      between: the context modality that is held against text; 'text' holds each text against
        itself, read a second time (with dropout that is Gao et al. 2021, SimCSE, section 3).
      width: E, of the shared space.
      bound_scale: whether the logits' scale stays at 100 at most.
      chunk: texts that all images are held against at a time, at most; 0 takes all at once.
      pooling: of that modality, and of text.
    """

    kind: ClassVar[str] = "contrastive"

    loss: str
    between: str
    width: int
    bound_scale: bool
    chunk: int
    pooling: tuple[Pooling, Pooling]

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Contrastive:
        loss_of(options["loss"], f"objectives.{name}.loss")
        if options["chunk"] < 0:
            raise ValueError(f"objectives.{name}.chunk={options['chunk']}: must be at least 0")
        built = cls(
            name=name,
            weight=float(options["weight"]),
            rule=str(options["rule"]),
            loss=str(options["loss"]),
            between=str(options["between"]),
            width=int(options["width"]),
            bound_scale=bool(options["bound_scale"]),
            chunk=int(options["chunk"]),
            pooling=(
                Pooling.from_config(f"objectives.{name}", options, ""),
                Pooling.from_config(f"objectives.{name}", options, "text_"),
            ),
        )
        rule = built.view.resolved()
        seen = [rule.to_context(each) for each in rule.modalities()]
        seen += [rule.from_context(each) for each in rule.modalities()]
        if any(each != NONE for each in seen):
            raise ValueError(
                f"objectives.{name}.rule={built.rule!r} lets image and text see each other, and "
                "contrast would be trivial; use 'separate'"
            )
        return built

    @property
    def of_text_alone(self) -> bool:
        """Whether no context has a part in it."""
        return self.between == "text"

    @property
    def again(self) -> View:
        """The second reading of the text, where it is held against itself."""
        return View(f"{self.name}_again", self.rule, alone=True)

    def views(self) -> tuple[View, ...]:
        return (self.view, self.again) if self.of_text_alone else (self.view,)

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return () if self.of_text_alone else (self.between,)

    def head(self) -> nn.Module | None:
        context, text = self.pooling
        poolings: tuple[tuple[str, Pooling], ...] = (("text", text),)
        if not self.of_text_alone:
            poolings = ((self.between, context), *poolings)
        return ContrastiveHead(poolings, self.width, loss_of(self.loss), self.bound_scale)

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        head = model.head[self.name]
        pass_ = encoded[self.name]
        text = head("text", pass_.text, text_valid(batch))
        if self.of_text_alone:
            other = head("text", encoded[self.again.name].text, text_valid(batch))
        else:
            seen = pass_.context_valid[self.between]
            other = head(self.between, pass_.context[self.between], seen)
        embedded = Embedded((other, text), paired_rows(batch, self.between))
        return self.compare(model, embedded)

    def embed_context(self, model: UnifiedModel, batch: Batch) -> Float[Array, "B E"]:
        """Unit vectors of the context that is held against text, read without any."""
        encoded = model.read_context(batch, self.view)
        seen = encoded.context_valid[self.between]
        vectors: Array = model.head[self.name](self.between, encoded.context[self.between], seen)
        return vectors

    def embed_text(self, model: UnifiedModel, batch: Batch) -> Float[Array, "B E"]:
        """Unit vectors of texts, read without any context."""
        x = model.read_text(batch["text"], self.view)
        vectors: Array = model.head[self.name]("text", x, text_valid(batch))
        return vectors

    @same_rank
    def compare(self, model: UnifiedModel, embedded: Embedded) -> ObjectiveOutput:
        """The loss among all examples that are embedded."""
        context, text = embedded.vectors
        paired = embedded.counts
        scale, bias = model.head[self.name].scale_and_bias()
        losses, right = compare_all(
            context, text, scale, bias, paired, loss=self.loss, chunk=self.chunk
        )
        one = jnp.ones((), jnp.float32)
        return ObjectiveOutput(
            loss=masked_metric(losses, paired),
            metrics={
                "accuracy": masked_metric(right.astype(jnp.float32), paired),
                "scale": (scale, one),
            },
            extras={
                # Computed only where a later objective reads it.
                "similarity": scale * jnp.einsum("BE,CE->BC", context, text) + bias,
                "paired": paired,
            },
            embedded=embedded,
        )


class ContrastiveHead(nn.Module):
    """Tokens pooled, projected, of unit length; temperature and bias.

    Attributes:
      poolings: of each modality that is embedded.
      width: E.
      loss: which temperature and bias training starts from.
      bound_scale: whether the scale stays at 100 at most.
    """

    poolings: tuple[tuple[str, Pooling], ...]
    width: int
    loss: PairLoss
    bound_scale: bool = True

    def setup(self) -> None:
        self.project = {
            name: Dense((self.width,), ("embed",), (None,), use_bias=pooling.projection == "affine")
            for name, pooling in self.poolings
            if pooling.projection != "none"
        }
        self.attend = {
            name: AttentionPool(pooling.heads, pooling.hidden)
            for name, pooling in self.poolings
            if pooling.pool == "attention"
        }
        start = nn.initializers.constant(self.loss.log_scale)
        self.log_scale = self.param("log_scale", start, ())
        if self.loss.bias is not None:
            self.bias = self.param("bias", nn.initializers.constant(self.loss.bias), ())

    def __call__(
        self, name: str, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]
    ) -> Float[Array, "B E"]:
        """Tokens of modality `name`, pooled and projected: float32 of unit norm."""
        pool = dict(self.poolings)[name].pool
        y = self.attend[name](x, valid) if pool == "attention" else pooled(pool, x, valid)
        y = constrain(y, "batch", "activation")
        if name in self.project:
            y = self.project[name](y)
        # The small term keeps the gradient finite for an example that has nothing valid.
        return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-12)

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """exp(t) and b of the logits; without the sigmoid loss b is 0."""
        log_scale = self.log_scale
        if self.bound_scale:
            # At CLIP's bound it stops growing, but its gradient goes on, so it can come back.
            bounded = jnp.minimum(log_scale, MAX_LOG_SCALE)
            log_scale = log_scale + jax.lax.stop_gradient(bounded - log_scale)
        return jnp.exp(log_scale), jnp.zeros(()) if self.loss.bias is None else self.bias


@same_rank
def text_valid(batch: Batch) -> Bool[Array, "B T"]:
    """Text tokens that are there."""
    return batch["text"]["valid"] & batch["text"]["present"][:, None]


@same_rank
def paired_rows(batch: Batch, between: str) -> Bool[Array, " B"]:
    """Examples that have both, with a text that describes (not one that answers a prompt)."""
    text = batch["text"]
    return batch[between]["present"] & text["present"] & ~text["prompted"]


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
      loss: of `LOSSES`, or `package.module:NAME` of a `PairLoss`.
      chunk: columns at a time, at most (it is lowered to a divisor of B); 0 takes all at once.

    Returns:
      The loss of each number, and whether its row is nearest to its own column.
    """
    count = rows.shape[0]
    size = largest_divisor(count, chunk or count)
    # Vectors are small: every device sees all columns, and keeps its own rows.
    columns = constrain(columns, None, None)
    own = scale * (rows * columns).sum(-1) + bias
    kind = loss_of(loss)
    start = Rows(
        loss=jnp.full(count, kind.start, jnp.float32),
        best=jnp.full(count, -jnp.inf),
        best_column=jnp.full(count, -1, jnp.int32),
    )

    def add(seen: Rows, block: Columns) -> tuple[Rows, Float[Array, " C"]]:
        logits = scale * jnp.einsum("BE,CE->BC", rows, block.vectors) + bias
        loss, of_columns = kind.part(seen.loss, logits, paired, block)
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
    return kind.finish(seen.loss, jnp.where(paired, own, NOWHERE), of_columns), right


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


@dataclass(frozen=True)
class PairLoss:
    """A loss over all pairs of a batch, worked off in blocks of columns.

    Attributes:
      start: of each row's running value.
      part: (running values [B], logits [B, C], rows that count [B], the block) -> the next running
        values [B], and what the block says of each of its columns [C].
      finish: (running values, each row's own logit, values of columns), each [B] -> the loss [B].
      log_scale, bias: of the logits as training starts; without a bias the loss has none.
    """

    start: float
    part: Callable[..., tuple[Array, Array]]
    finish: Callable[[Array, Array, Array], Array]
    log_scale: float
    bias: float | None = None


LOSSES = {
    # Radford et al. 2021, figure 3: the mean of both ways.
    "softmax": PairLoss(
        -float("inf"),
        softmax_part,
        lambda rows, own, columns: 0.5 * (rows - own + columns),
        SOFTMAX_START,
    ),
    # Zhai et al. 2023, equation 1, summed over a row.
    "sigmoid": PairLoss(0.0, sigmoid_part, lambda rows, own, columns: rows, *SIGMOID_START),
}


def loss_of(name: str, field: str = "contrastive loss") -> PairLoss:
    """Returns a loss by its name, or `package.module:NAME` of one from outside.

    Raises:
      ValueError: naming the field, there is none of that name.
    """
    found: PairLoss = resolve(field, name, LOSSES)
    return found


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
