"""Contrastive objectives: the modalities of an example match better than those of others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import NONE, View
from unified_mm.nn.layers import Dense
from unified_mm.nn.pooling import AttentionPool, pool_of, pooled
from unified_mm.objectives.objective import (
    Embedded,
    Metric,
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
)
from unified_mm.objectives.pair_losses import PairLoss, compare_all, loss_of
from unified_mm.parallel.sharding import constrain

MAX_LOG_SCALE = 4.6052  # ln 100: CLIP's bound, without which training can run away.
PROJECTIONS = ("linear", "affine", "none")


@dataclass(frozen=True)
class Pooling:
    """The options by which a modality's tokens become one vector of the shared space.

    Attributes:
      pool: 'mean', 'first' (a class token), 'last' (of the valid tokens), 'attention' of a learned
        query (Zhai et al. 2022, "Scaling vision transformers", section 3.2), or
        `package.module:FUNCTION`.
      projection: 'linear', 'affine' (with a bias) or 'none'.
      heads, hidden: of that attention, and of the feed-forward that follows it.
    """

    pool: str
    projection: str
    heads: int
    hidden: int

    @classmethod
    def from_config(cls, field: str, options: Mapping[str, Any], prefix: str) -> Pooling:
        """Returns the options of `config.objectives.<name>`.

        Args:
          field: dotted name of that group, for messages.
          options: the group; its `<prefix>pool` and `<prefix>projection` are used.
          prefix: of these keys.

        Raises:
          ValueError: an unknown pool or projection.
        """
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
    """InfoNCE both ways (Radford et al. 2021, figure 3) or sigmoid loss (Zhai et al. 2023, eq. 1).

    Each modality has a pooling and a projection, and each pair of modalities a loss; that of the
    objective is the mean over all pairs and all examples that have both.

    Attributes:
      loss: of `LOSSES`, or `package.module:NAME`.
      between: the modalities that are compared, text last where it is among them; text alone is
        compared with itself, encoded a second time (with dropout that is Gao et al. 2021, SimCSE,
        section 3).
      width: Z.
      bound_scale: whether the logits' scale stays at 100 at most.
      chunk: the most columns that all rows are compared with at a time; 0 takes all at once.
      pooling: of each of the modalities.
    """

    kind: ClassVar[str] = "contrastive"

    loss: str
    between: tuple[str, ...]
    width: int
    bound_scale: bool
    chunk: int
    pooling: tuple[Pooling, ...]

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Contrastive:
        loss_of(options["loss"], f"objectives.{name}.loss")
        if options["chunk"] < 0:
            raise ValueError(f"objectives.{name}.chunk={options['chunk']}: must be at least 0")
        between = named_modalities(options["between"], f"objectives.{name}.between")
        built = cls(
            name=name,
            weight=float(options["weight"]),
            rule=str(options["rule"]),
            loss=str(options["loss"]),
            between=between,
            width=int(options["width"]),
            bound_scale=bool(options["bound_scale"]),
            chunk=int(options["chunk"]),
            pooling=tuple(
                Pooling.from_config(f"objectives.{name}", options, "text_" * (each == "text"))
                for each in between
            ),
        )
        rule = built.view.resolved
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
        """Returns whether text is compared with itself, without any context modality."""
        return self.between == ("text",)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of modalities that are compared, in order."""
        return list(itertools.combinations(self.between, 2)) or [("text", "text")]

    @cached_property
    def view(self) -> View:
        return View(self.name, self.rule, with_text="text" in self.between)

    @property
    def again(self) -> View:
        """The view for the second encoding of text, where text is compared with itself."""
        return View(f"{self.name}_again", self.rule, alone=True)

    def views(self) -> tuple[View, ...]:
        return (self.view, self.again) if self.of_text_alone else (self.view,)

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.between if name != "text")

    def head(self) -> nn.Module | None:
        poolings = tuple(zip(self.between, self.pooling, strict=True))
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
        seen = encoded[self.name]
        vectors = tuple(self._vectors(head, name, seen, batch) for name in self.between)
        if self.of_text_alone:
            again = self._vectors(head, "text", encoded[self.again.name], batch)
            vectors = (again, *vectors)
        return self.compare(model, Embedded(vectors, counted_rows(batch, self.between)))

    def _vectors(self, head: Any, name: str, seen: Encoded, batch: Batch) -> Float[Array, "B Z"]:
        """Returns the unit vectors of one modality in a pass."""
        if name == "text":
            vectors: Array = head("text", seen.text, text_valid(batch))
        else:
            vectors = head(name, seen.outputs[name], seen.valid[name])
        return vectors

    def embed(self, model: UnifiedModel, batch: Batch, of: str) -> Float[Array, "B Z"]:
        """Returns the unit vectors of one modality, encoded without text or without context."""
        head = model.head[self.name]
        if of == "text":
            x = model.read_text(batch["text"], self.view)
            vectors: Array = head("text", x, text_valid(batch))
            return vectors
        return self._vectors(head, of, model.read_context(batch, self.view), batch)

    @same_rank
    def compare(self, model: UnifiedModel, embedded: Embedded) -> ObjectiveOutput:
        """Returns the loss between all examples that are embedded."""
        scale, bias = model.head[self.name].scale_and_bias()
        count = len(embedded.vectors)
        numbers = list(itertools.combinations(range(count), 2))
        metrics: dict[str, Metric] = {}
        losses, wheres = [], []
        for (a, b), pair in zip(numbers, self.pairs, strict=True):
            one, other = embedded.vectors[a], embedded.vectors[b]
            # Text alone has one column of counts for both readings.
            paired = embedded.counts[:, a] & embedded.counts[:, -1 if self.of_text_alone else b]
            found, right = compare_all(
                one, other, scale, bias, paired, loss=self.loss, chunk=self.chunk
            )
            losses.append(found)
            wheres.append(paired)
            named = "accuracy" if len(numbers) == 1 else f"accuracy_{'_'.join(pair)}"
            metrics[named] = masked_metric(right.astype(jnp.float32), paired)
            if len(numbers) > 1:
                metrics[f"loss_{'_'.join(pair)}"] = masked_metric(found, paired)
        # Of the last pair, which is with text if any is: what negatives are mined from.
        extras = {
            # Computed only where a later objective reads it.
            "similarity": scale * jnp.einsum("BZ,CZ->BC", one, other) + bias,
            "paired": paired,
        }
        metrics["scale"] = (scale, jnp.ones((), jnp.float32))
        loss = masked_metric(jnp.concatenate(losses), jnp.concatenate(wheres))
        return ObjectiveOutput(loss, metrics, extras, embedded)


def named_modalities(between: Any, field: str) -> tuple[str, ...]:
    """Returns the modalities that a contrastive objective compares, text last.

    Args:
      between: names, or a string of names separated by commas; one name alone is compared with
        text, and 'text' alone with itself.
      field: of the config, for messages.

    Raises:
      ValueError: there is no name, or one comes twice.
    """
    names = between.split(",") if isinstance(between, str) else list(between)
    names = [name.strip() for name in names]
    if len(names) == 1 and names != ["text"]:
        names.append("text")
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{field}={between!r}: name each modality once, as in 'image,audio'")
    return tuple(sorted(names, key=lambda name: name == "text"))


class ContrastiveHead(nn.Module):
    """The head of a contrastive objective: pooling, projection, temperature and bias.

    Attributes:
      poolings: (modality, options) for each modality that is embedded.
      width: Z.
      loss: has the initial temperature and bias.
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
    ) -> Float[Array, "B Z"]:
        """Pools and projects the tokens of modality `name` to float32 vectors of unit norm."""
        pool = dict(self.poolings)[name].pool
        y = self.attend[name](x, valid) if pool == "attention" else pooled(pool, x, valid)
        y = constrain(y, "batch", "activation")
        if name in self.project:
            y = self.project[name](y)
        # The small term keeps the gradient finite for an example that has nothing valid.
        return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-12)

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the scale and the bias of the logits; without a bias in the loss it is 0."""
        log_scale = self.log_scale
        if self.bound_scale:
            # At CLIP's bound it stops growing, but its gradient goes on, so it can come back.
            bounded = jnp.minimum(log_scale, MAX_LOG_SCALE)
            log_scale = log_scale + jax.lax.stop_gradient(bounded - log_scale)
        return jnp.exp(log_scale), jnp.zeros(()) if self.loss.bias is None else self.bias


@same_rank
def text_valid(batch: Batch) -> Bool[Array, "B T"]:
    """Returns which text tokens are valid, in the examples that have text."""
    return batch["text"]["valid"] & batch["text"]["present"][:, None]


@same_rank
def counted_rows(batch: Batch, between: Sequence[str]) -> Bool[Array, "B M"]:
    """Returns which examples have each modality; of texts, only those without a prompt count.

    Raises:
      ValueError: an example has several items of a modality, as documents do.
    """
    for name in between:
        if batch[name]["present"].ndim != 1:
            raise ValueError(
                f"contrast holds one {name} of each example against the others', and the examples "
                "of this batch, such as documents, have several"
            )
    counts = [batch[name]["present"] for name in between]
    if "text" in between:
        counts[-1] = counts[-1] & ~batch["text"]["prompted"]
    return jnp.stack(counts, axis=1)
