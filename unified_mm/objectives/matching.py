"""Image-text matching: does this text belong to this image? (Li et al. 2021, ALBEF, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unified_mm.data.pipeline import RECORD
from unified_mm.models.unified import Batch, Encoded, UnifiedModel, text_group
from unified_mm.nn.attention.rules import View
from unified_mm.nn.layers import Dense
from unified_mm.objectives.objective import (
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
)
from unified_mm.objectives.pair_losses import equal_rows


@dataclass(frozen=True)
class Matching(TextObjective):
    """Binary classification of pairs: an image with its own text, a hard wrong text or image.

    Where the rule keeps the context from seeing the text, and the pass of `mine_from` encoded the
    context by the same rule, the text alone is run, on the keys and values of the context from that
    pass; else both are encoded anew.

    Attributes:
      mine_from: the objective from whose similarities hard negatives are drawn, and whose pass has
        encoded the context.
    """

    kind: ClassVar[str] = "matching"
    rngs: ClassVar[tuple[str, ...]] = ("mining",)

    tells_records: ClassVar[bool] = True

    weight: float = 0.0
    rule: str = "prefix"
    mine_from: str = "contrastive"

    def needs(self) -> tuple[str, ...]:
        return (self.mine_from,)

    def views(self) -> tuple[View, ...]:
        return ()

    def head(self) -> nn.Module | None:
        return MatchingHead()

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        mined = context.earlier[self.mine_from].extras
        similarity, paired = jax.lax.stop_gradient(mined["similarity"]), mined["paired"]
        key = model.make_rng("mining")
        ids, records = batch["text"]["ids"], batch["text"].get(RECORD)
        wrong_text, wrong_image, minable = mine(key, similarity, paired, ids, records)
        rows = jnp.arange(paired.shape[0])
        image_rows = jnp.concatenate([rows, rows, wrong_image])
        text_rows = jnp.concatenate([rows, wrong_text, rows])
        text = {name: values[text_rows] for name, values in batch["text"].items()}
        x = self._read(model, encoded, batch, text, image_rows, deterministic)
        logits = model.head[self.name](x, text["valid"])
        truth = jnp.arange(logits.shape[0]) < paired.shape[0]
        counted = jnp.concatenate([paired, minable[0], minable[1]])
        losses = -jax.nn.log_sigmoid(jnp.where(truth, logits, -logits))
        right = (logits > 0) == truth
        return ObjectiveOutput(
            loss=masked_metric(losses, counted),
            metrics={"accuracy": masked_metric(right.astype(jnp.float32), counted)},
            extras={},
        )

    def _read(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        text: Mapping[str, Array],
        image_rows: Int[Array, " rows"],
        deterministic: bool,
    ) -> Float[Array, "rows T D"]:
        """Encodes text with the image of its row, from the saved pass where the rule allows it."""
        if self._can_reuse(encoded, model.context_names):
            cache = encoded[self.mine_from].cache
            assert cache is not None
            begins = model.text_begins(cache, self.view)
            group = text_group(self.view, text["ids"].shape[1], begins)
            cache = cache.select(image_rows).reserve(group)
            return model.extend(cache, text, self.view, deterministic=deterministic)[0]
        context = {
            name: jax.tree.map(lambda values: values[image_rows], batch[name])
            for name in model.context_names
        }
        both = {**context, "text": text}
        return model.encode(both, (self.view,), deterministic=deterministic)[self.name].text

    def _can_reuse(self, encoded: Mapping[str, Encoded], contexts: Sequence[str]) -> bool:
        view = self.view.resolved.context_view(contexts)
        return view is not None and view == encoded[self.mine_from].rule.context_view(contexts)


class MatchingHead(nn.Module):
    """A dense map from the text's last valid token to one logit."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows T D"], valid: Bool[Array, "rows T"]
    ) -> Float[Array, " rows"]:
        last = jnp.maximum(valid.sum(1) - 1, 0)
        token = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
        return Dense((1,), ("embed",), (None,), name="score")(token)[:, 0]


@same_rank
def mine(
    key: Array,
    similarity: Float[Array, "B B"],
    paired: Bool[Array, " B"],
    ids: Int[Array, "B T"],
    records: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"], tuple[Bool[Array, " B"], Bool[Array, " B"]]]:
    """Draws hard negatives with the probabilities of a softmax of their similarity.

    Texts equal to the right one are no negatives, nor are other texts of the same record.

    Args:
      key: for the draws.
      similarity: logits of image (rows) and text (columns).
      paired: which examples have both.
      ids: token ids, to tell equal texts.
      records: numbers of the examples' records; None where each is there but once.

    Returns:
      For each image a wrong text, for each text a wrong image, and for each of these whether there
      was one to draw.
    """
    same = equal_rows(ids, ids)
    if records is not None:
        same = same | equal_rows(records, records)
    allowed = paired[:, None] & paired[None, :] & ~same
    logits = jnp.where(allowed, similarity, -jnp.inf)
    for_image, for_text = jax.random.split(key)
    safe = jnp.where(allowed.any(1)[:, None], logits, 0.0)
    wrong_text = jax.random.categorical(for_image, safe, axis=1)
    safe = jnp.where(allowed.any(0)[None, :], logits, 0.0)
    wrong_image = jax.random.categorical(for_text, safe, axis=0)
    return wrong_text, wrong_image, (allowed.any(1), allowed.any(0))
