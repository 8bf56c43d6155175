"""Classification: the pooled tokens of one modality become scores of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from unified_mm.config import option
from unified_mm.data.pipeline import Arrays
from unified_mm.data.records import Record
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import View
from unified_mm.nn.layers import Dense
from unified_mm.nn.pooling import POOLS, AttentionPool, pool_of
from unified_mm.objectives.objective import (
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
)

LABELS = "labels"  # key of a batch: float32 [B, C], how much an example is of each class


@dataclass(frozen=True)
class Classification(TextObjective):
    """Cross-entropy of one class an example, or of each class alone where it may have many.

    Attributes:
      of: the modality that is classified.
      classes: their names; () takes those of the training data, in order, and the run keeps them.
      many: whether an example may have several classes or none (tagging): sigmoids, not a softmax.
      pool: of the modality's tokens, as of contrast.
      pool_heads: of 'attention'.
      pool_feed_forward: width of what follows it; 0: four times the width.
      smoothing: share of the target that is spread over all classes (Szegedy et al. 2016, 7).
      mix: share of training examples to which another one is added, with its classes; the modality
        must be able to.
      mix_decibels: the most by which the added one is louder or softer.
    """

    weight: float = 0.0
    rule: str = "separate"
    of: str = "image"
    classes: tuple[str, ...] = ()
    many: bool = False
    pool: str = option("mean", registry=POOLS)
    pool_heads: int = option(4, least=1)
    pool_feed_forward: int = option(0, least=0)
    smoothing: float = option(0.0, least=0, below=1)
    mix: float = option(0.0, least=0, most=1)
    mix_decibels: float = option(6.0, least=0)

    from_data: ClassVar[tuple[str, ...]] = ("classes",)

    @cached_property
    def view(self) -> View:
        return View(self.name, self.rule, with_text=False)

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return (self.of,)

    def head(self) -> nn.Module | None:
        if not self.classes:
            raise ValueError(
                f"objectives.{self.name}.classes is empty: the command takes them from the "
                "training data; elsewhere, give their names"
            )
        return ClassHead(self)

    def measure(self, records: Sequence[Record]) -> dict[str, Any]:
        """Returns the names of the classes of records.

        Raises:
          ValueError: there are fewer than two.
        """
        found = sorted({label for record in records for label in record.labels})
        if len(found) < 2:
            raise ValueError(
                f"objectives.{self.name} needs two classes at least, and the training examples "
                f"have {found}: lists name them in the field data.fields.label, folders by their "
                "names"
            )
        return {"classes": tuple(found)}

    def targets(self, record: Record) -> Float[np.ndarray, " C"]:
        """Returns the classes of a record, 1 for each.

        Raises:
          ValueError: one that is none of the run's.
        """
        found = np.zeros(len(self.classes), np.float32)
        for label in record.labels:
            if label not in self.classes:
                raise ValueError(
                    f"the class {label!r} of example {record.id!r} is none of the {len(found)} of "
                    f"objectives.{self.name}.classes"
                )
            found[self.classes.index(label)] = 1.0
        return found

    def preparer(self, modality: Any, records: Sequence[Record]) -> Labelled:
        """Returns what prepares the modality's arrays with the classes beside them.

        Raises:
          ValueError: examples are to be mixed that the modality cannot mix, or that have one class.
        """
        if self.mix and not (self.many and hasattr(modality, "mix")):
            raise ValueError(
                f"objectives.{self.name}.mix={self.mix}: only what may have many classes "
                f"(objectives.{self.name}.many=True) is mixed, and only audio can be"
            )
        return Labelled(self, modality, records)

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        seen = encoded[self.name]
        logits = model.head[self.name](seen.outputs[self.of], seen.valid[self.of])
        return self.loss(logits, batch[self.of][LABELS], batch[self.of]["present"])

    @same_rank
    def loss(
        self, logits: Float[Array, "B C"], labels: Float[Array, "B C"], present: Bool[Array, " B"]
    ) -> ObjectiveOutput:
        """Returns the loss of the examples that count: those with a class, of many all."""
        if self.many:
            target = labels * (1 - self.smoothing) + 0.5 * self.smoothing
            losses = optax.sigmoid_binary_cross_entropy(logits, target).mean(-1)
            right = ((logits > 0) == (labels > 0)).astype(jnp.float32).mean(-1)
            counts = present
        else:
            counts = present & (labels.sum(-1) > 0)
            target = labels / jnp.maximum(labels.sum(-1, keepdims=True), 1.0)
            target = target * (1 - self.smoothing) + self.smoothing / len(self.classes)
            losses = -(target * jax.nn.log_softmax(logits)).sum(-1)
            right = jnp.take_along_axis(labels, logits.argmax(-1)[:, None], 1)[:, 0]
        loss = masked_metric(losses, counts)
        return ObjectiveOutput(loss, {"accuracy": masked_metric(right, counts)}, {})

    def probabilities(self, model: UnifiedModel, batch: Batch) -> Float[Array, "B C"]:
        """Returns the probability of each class for each example."""
        seen = model.read_context(batch, self.view)
        logits = model.head[self.name](seen.outputs[self.of], seen.valid[self.of])
        return jax.nn.sigmoid(logits) if self.many else jax.nn.softmax(logits)


class ClassHead(nn.Module):
    """The head of a classification: pooling, and a dense map to float32 logits."""

    options: Classification

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B C"]:
        o = self.options
        pool = pool_of(o.pool)
        if pool == "attention":
            y = AttentionPool(o.pool_heads, o.pool_feed_forward, name="attend")(x, valid)
        else:
            y = pool(x.astype(jnp.float32), valid)
        return Dense((len(o.classes),), ("embed",), (None,), use_bias=True, name="score")(y)


@dataclass(frozen=True)
class Labelled:
    """The preparer of a modality that adds the classes of each example, as `LABELS`.

    Attributes:
      objective: has the classes, and says how many examples are mixed.
      modality: prepares all else.
      records: what examples are mixed with.
    """

    objective: Classification
    modality: Any
    records: Sequence[Record]

    def prepare(self, record: Record, rng: np.random.Generator | None) -> Arrays:
        o = self.objective
        arrays, targets = self.modality.prepare(record, rng), o.targets(record)
        if rng is not None and o.mix and rng.random() < o.mix and arrays["present"]:
            other = self.records[int(rng.integers(len(self.records)))]
            added = self.modality.prepare(other, rng)
            if added["present"]:
                arrays = self.modality.mix(arrays, added, rng, o.mix_decibels)
                targets = np.maximum(targets, o.targets(other))
        return arrays | {LABELS: targets}

    def absent(self) -> Arrays:
        none = np.zeros(len(self.objective.classes), np.float32)
        return self.modality.absent() | {LABELS: none}
