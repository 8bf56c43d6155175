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
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unified_mm.config import option
from unified_mm.data.pipeline import RECORD, Arrays
from unified_mm.data.records import Record
from unified_mm.modalities.text import READER_KEYS
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import NONE, View
from unified_mm.nn.layers import Dense
from unified_mm.nn.pooling import POOLS, AttentionPool, pool_of
from unified_mm.objectives.objective import (
    Embedded,
    Metric,
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
    text_valid,
)
from unified_mm.objectives.pair_losses import LOSSES, PairLoss, compare_all
from unified_mm.parallel.sharding import constrain
from unified_mm.registry import resolve

MAX_LOG_SCALE = 4.6052  # ln 100: CLIP's bound, without which training can run away.
PROJECTIONS = ("linear", "affine", "none")
# The keys under which a training batch's text holds what its foil has under `ids`, ...
FOIL = {"ids": "foil_ids", "valid": "foil_valid", "present": "foil_present"}
# ... and where there is a reader, its tokens of both.
READ_FOIL = {name: f"foil_{name}" for name in READER_KEYS.values()}


@dataclass(frozen=True)
class Contrastive(TextObjective):
    """InfoNCE both ways (Radford et al. 2021, figure 3) or sigmoid loss (Zhai et al. 2023, eq. 1).

    Each modality has a pooling and a projection, and each pair of modalities a loss; that of the
    objective is the mean over all pairs and all examples that have both.

    Attributes:
      loss: of `LOSSES`, or `package.module:NAME`.
      between: the modalities that are compared, text last where it is among them, each two with a
        loss; text alone is compared with itself, encoded a second time (with dropout that is Gao
        et al. 2021, SimCSE, section 3). Given as names, or as a string of them with commas; one
        alone is against text.
      width: Z.
      pool: of the context's tokens: 'mean', 'first' (a class token), 'first_two' (their mean, as of
        AST), 'last' (of the valid tokens), 'attention' of a learned query (Zhai et al. 2022,
        "Scaling vision transformers", section 3.2), or `package.module:FUNCTION`.
      text_pool: of the text's.
      pool_heads: of 'attention'.
      pool_feed_forward: width of what follows it; 0: four times the width.
      projection, text_projection: 'linear', 'affine' (with a bias) or 'none'.
      bound_scale: whether the logits' scale stays at 100 at most.
      chunk: the most columns that all rows are compared with at a time; 0 takes all at once.
      same_item_negatives: whether another example of the same record, or with an equal text, counts
        as a wrong answer as any other does. False leaves such pairs out.
      foils: whether a context is held against a false caption of its own too, beside the texts of
        the batch (Yuksekgonul et al. 2023, NegCLIP, section 4, in its simplest form). It is drawn
        among the foils of its caption, and read by itself under the same rule; texts with foils are
        read in every step, whatever `data.keep_features` says. `accuracy` leaves it out.
      reader: whether texts are read by `model.reader`, the text model of another run (which
        `model.start_from.reader` names), and not by the main transformer. It is trained, too, but
        where `train.freeze_rules` hold it.
    """

    weight: float = 1.0
    rule: str = "separate"
    loss: str = option("softmax", registry=LOSSES)
    between: Any = "image"
    width: int = option(128, least=1)
    pool: str = option("mean", registry=POOLS)
    text_pool: str = option("mean", registry=POOLS)
    pool_heads: int = option(4, least=1)
    pool_feed_forward: int = option(0, least=0)
    projection: str = option("linear", choices=PROJECTIONS)
    text_projection: str = option("linear", choices=PROJECTIONS)
    bound_scale: bool = True
    chunk: int = option(1024, least=0)
    same_item_negatives: bool = True
    foils: bool = False
    reader: bool = False

    kind: ClassVar[str] = "contrastive"

    def __post_init__(self) -> None:
        field = f"objectives.{self.name}"
        object.__setattr__(self, "between", named_modalities(self.between, f"{field}.between"))
        for asked in ("foils", "reader"):
            if getattr(self, asked) and (self.between[-1] != "text" or len(self.between) == 1):
                raise ValueError(
                    f"{field}.{asked}=True, but {field}.between={','.join(self.between)!r} holds "
                    "nothing against a text: name text beside another modality, or set "
                    f"{asked} to False"
                )
        rule = self.view.resolved
        seen = [rule.to_context(each) for each in rule.modalities()]
        seen += [rule.from_context(each) for each in rule.modalities()]
        if any(each != NONE for each in seen):
            raise ValueError(
                f"{field}.rule={self.rule!r} lets image and text see each other, and "
                "contrast would be trivial; use 'separate'"
            )

    @property
    def tells_records(self) -> bool:
        """Whether the numbers of the examples' records are asked for."""
        return not self.same_item_negatives

    @cached_property
    def compared(self) -> tuple[str, ...]:
        """The modality of each array of vectors: those of `between`, or text twice."""
        return self.between if len(self.between) > 1 else ("text", "text")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of modalities that are compared, in order."""
        return list(itertools.combinations(self.compared, 2))

    @cached_property
    def view(self) -> View:
        return View(self.name, self.rule, with_text="text" in self.between and not self.reader)

    def views(self) -> tuple[View, ...]:
        if len(self.between) > 1:
            return (self.view,)
        return (self.view, View(f"{self.name}_again", self.rule, alone=True))

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.between if name != "text")

    def head(self) -> nn.Module | None:
        names = {each: self.text_pool if each == "text" else self.pool for each in self.between}
        pools = {each: pool_of(name) for each, name in names.items()}
        loss = resolve("contrastive loss", self.loss, LOSSES)
        if self.foils and loss.foil is None:
            raise ValueError(
                f"objectives.{self.name}.foils=True, but its loss {self.loss!r} has no `foil`: set "
                "foils to False, or the loss to one of " + ", ".join(LOSSES)
            )
        return ContrastiveHead(self, loss, pools)

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        counts = counted_rows(batch, self.between)
        head = model.head[self.name]
        vectors = []
        for view in reversed(self.views()):
            outputs, valid = dict(encoded[view.name].outputs), dict(encoded[view.name].valid)
            if self.reader:
                outputs["text"], valid["text"] = model.head["reader"](batch["text"])
            elif "text" in self.between:
                valid["text"] = text_valid(batch["text"])
            vectors += [head(name, outputs[name], valid[name]) for name in self.between]
        if self.foils and FOIL["ids"] in batch["text"]:  # else a batch for evaluation
            texts = batch["text"]
            foil = {key: texts[name] for key, name in (FOIL | READ_FOIL).items() if name in texts}
            vectors.append(head("text", *self.read(model, foil, deterministic=deterministic)))
            counts = jnp.concatenate([counts, foil["present"][:, None]], axis=1)
        return self.compare(model, Embedded(tuple(vectors), counts, self.items(batch)))

    def read(
        self, model: UnifiedModel, text: Mapping[str, Array], *, deterministic: bool = True
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        """Returns what texts alone are to this objective, and which of it is valid."""
        if self.reader:
            read: Any = model.head["reader"](text)
            return read
        return model.read_text(text, self.view, deterministic=deterministic), text_valid(text)

    def items(self, batch: Batch) -> dict[str, Int[Array, "B ..."]]:
        """Returns what tells examples of one item, by name: `RECORD` and the ids of `text`.

        A batch without numbers of records, such as one for evaluation, holds each but once.
        """
        if self.same_item_negatives:
            return {}
        numbers = batch[self.between[0]].get(RECORD)
        found = {} if numbers is None else {RECORD: numbers}
        return found | ({"text": batch["text"]["ids"]} if "text" in self.between else {})

    def embed(self, model: UnifiedModel, batch: Batch, of: str) -> Float[Array, "B Z"]:
        """Returns the unit vectors of one modality, encoded without text or without context."""
        if of == "text":
            x, valid = self.read(model, batch["text"])
        else:
            seen = model.read_context(batch, self.view)
            x, valid = seen.outputs[of], seen.valid[of]
        vectors: Array = model.head[self.name](of, x, valid)
        return vectors

    @same_rank
    def compare(self, model: UnifiedModel, embedded: Embedded) -> ObjectiveOutput:
        """Returns the loss between all examples that are embedded.

        Vectors and counts of foils, if any, come after those of the modalities.
        """
        head = model.head[self.name]
        scale, bias = head.scale_and_bias()
        items = embedded.items or {}
        columns = {name: embedded.counts[:, place] for place, name in enumerate(self.between)}
        each = [
            (name, vectors, columns[name])
            for name, vectors in zip(self.compared, embedded.vectors, strict=False)
        ]
        foils = embedded.vectors[len(each) :]
        metrics: dict[str, Metric] = {}
        losses, wheres = [], []
        for (a, one, has_one), (b, other, has_other) in itertools.combinations(each, 2):
            paired = has_one & has_other
            # An equal text makes no difference between, say, an image and a sound.
            told = [each for name, each in items.items() if name in (RECORD, a, b)]
            pair = f"_{a}_{b}" if len(each) > 2 else ""
            false = None
            if foils and b == "text":
                there = paired & embedded.counts[:, -1]
                false = foils[0], there
                nearer = ((one * other).sum(-1) > (one * foils[0]).sum(-1)).astype(jnp.float32)
                metrics[f"foil_accuracy{pair}"] = masked_metric(nearer, there)
                metrics[f"with_foil{pair}"] = masked_metric(there.astype(jnp.float32), paired)
            found, right = compare_all(
                one, other, scale, bias, paired,
                loss=head.loss, chunk=self.chunk, items=told, foils=false,
            )  # fmt: skip
            losses.append(found)
            wheres.append(paired)
            metrics[f"accuracy{pair}"] = masked_metric(right.astype(jnp.float32), paired)
            if pair:
                metrics[f"loss{pair}"] = masked_metric(found, paired)
        # Of the last pair, which is with text if any is: what negatives are mined from.
        extras = {
            # Computed only where a later objective reads it.
            "similarity": scale * jnp.einsum("BZ,CZ->BC", one, other) + bias,
            "paired": paired,
        }
        metrics["scale"] = (scale, jnp.ones((), jnp.float32))
        loss = masked_metric(jnp.concatenate(losses), jnp.concatenate(wheres))
        return ObjectiveOutput(loss, metrics, extras, embedded)


@dataclass(frozen=True)
class Foiled:
    """The preparer of texts that adds a foil of the caption that is drawn, under the keys `FOIL`.

    The text and what is drawn of it stay as they are without foils.

    Attributes:
      modality: of the texts.
    """

    modality: Any

    def prepare(self, record: Record, rng: np.random.Generator | None) -> Arrays:
        if not record.texts:
            return self.absent()
        number = 0 if rng is None else self.modality.draw_view(record, rng)
        text, arrays = record.texts[number], self.modality.prepare_view(record, number)
        foils = [] if text.prompt else [foil for of, foil in record.foils if of == text.target]
        if not foils:
            return arrays | self.none()
        foil = foils[0 if rng is None else int(rng.integers(len(foils)))]
        false = self.modality.encode("", foil)
        # Both are cut before the word that makes it false: it is none.
        ids = [key for key in ("ids", READER_KEYS["ids"]) if key in false]
        if any(np.array_equal(false[key], arrays[key]) for key in ids):
            return arrays | self.none()
        return arrays | {
            name: false[key] for key, name in (FOIL | READ_FOIL).items() if key in false
        }

    def none(self) -> Arrays:
        """Returns the arrays of a text without foil."""
        absent = self.modality.absent()
        return {name: absent[key] for key, name in (FOIL | READ_FOIL).items() if key in absent}

    def absent(self) -> Arrays:
        return self.modality.absent() | self.none()


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
      options: of the objective.
      loss: has the initial temperature and bias.
      pools: of each modality that is embedded, 'attention' or a function of `POOLS`.
    """

    options: Contrastive
    loss: PairLoss
    pools: Mapping[str, Any]

    def setup(self) -> None:
        o = self.options
        kinds = {name: o.text_projection if name == "text" else o.projection for name in o.between}
        self.project = {
            name: Dense((o.width,), ("embed",), (None,), use_bias=kind == "affine")
            for name, kind in kinds.items()
            if kind != "none"
        }
        self.attend = {
            name: AttentionPool(o.pool_heads, o.pool_feed_forward)
            for name, pool in self.pools.items()
            if pool == "attention"
        }
        start = nn.initializers.constant(self.loss.log_scale)
        self.log_scale = self.param("log_scale", start, ())
        if self.loss.bias is not None:
            self.bias = self.param("bias", nn.initializers.constant(self.loss.bias), ())

    def __call__(
        self, name: str, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]
    ) -> Float[Array, "B Z"]:
        """Pools and projects the tokens of modality `name` to float32 vectors of unit norm."""
        if name in self.attend:
            y = self.attend[name](x, valid)
        else:
            y = self.pools[name](x.astype(jnp.float32), valid)
        y = constrain(y, "batch", "activation")
        if name in self.project:
            y = self.project[name](y)
        # The small term keeps the gradient finite for an example that has nothing valid.
        return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-12)

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the scale and the bias of the logits; without a bias in the loss it is 0."""
        log_scale = self.log_scale
        if self.options.bound_scale:
            # At CLIP's bound it stops growing, but its gradient goes on, so it can come back.
            bounded = jnp.minimum(log_scale, MAX_LOG_SCALE)
            log_scale = log_scale + jax.lax.stop_gradient(bounded - log_scale)
        return jnp.exp(log_scale), jnp.zeros(()) if self.loss.bias is None else self.bias


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
