"""Early fusion: one transformer over one sequence, [context | text | text ...]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.config import build_options
from unified_mm.models.unified import (
    Batch,
    Encoded,
    UnifiedModel,
    text_group,
)
from unified_mm.nn.attention.attention import AttentionPlan, plan_attention
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import ALL, MaskTable, View, plan_passes
from unified_mm.nn.dropping import Scorer, distinctness, is_pair, most_important, rows_at, weighed
from unified_mm.nn.options import DroppingOptions
from unified_mm.nn.tokens import (
    Group,
    TokenMetadata,
    Tokens,
    concatenate,
    join_metadata,
    spans,
    unfold_items,
)
from unified_mm.nn.transformer import Leave


class EarlyFusion(UnifiedModel):
    """A fusion in which all modalities are tokens of one transformer, under attention rules."""

    abilities: ClassVar[frozenset[str]] = frozenset({"contrastive", "captioning", "matching"})
    drops_context: ClassVar[bool] = True
    reads_text_alone: ClassVar[bool] = True

    @classmethod
    def from_config(cls, model: Any, modalities: Any, heads: Any, **more: Any) -> UnifiedModel:
        built = super().from_config(model, modalities, heads, **more)
        dropping = build_options(DroppingOptions, model.dropping, "model.dropping")
        return built.clone(options=replace(built.options, dropping=dropping))

    def setup(self) -> None:
        super().setup()
        dropping = self.options.dropping
        if dropping.keep < 1 and dropping.by == "learned":
            self.scorer = Scorer(self.options)

    def embed_context(self, batch: Batch) -> list[Tokens]:
        """Returns the tokens of each context modality, before any layer of the transformer."""
        parts: list[Tokens] = []
        before = 0
        for name in self.context_names:
            tokens = self.embed_items(name, batch[name])
            parts.append(unfold_items(tokens.embeddings, tokens.metadata, batch[name], before))
            before += parts[-1].embeddings.shape[1]
        return parts

    def encode(
        self, batch: Batch, views: Sequence[View], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        encoded: dict[str, Encoded] = {}
        for sharing in plan_passes(views, self.context_names):
            context = self.embed_context(batch)
            after = sum(part.embeddings.shape[1] for part in context)
            texts = [
                self.embed_text(batch["text"], view.name, after)
                for view in sharing
                if view.with_text
            ]
            encoded |= self.encode_together(context, texts, sharing, deterministic=deterministic)
        return encoded

    def encode_together(
        self,
        context: Sequence[Tokens],
        texts: Sequence[Tokens],
        views: Sequence[View],
        *,
        keep_text: bool = False,
        deterministic: bool = True,
    ) -> dict[str, Encoded]:
        """Runs one pass over [context | text | text ...].

        Args:
          context: tokens of each modality.
          texts: tokens of each text, the groups named as their views.
          views: of the pass.
          keep_text: whether the cache holds the texts too, beside the context.
          deterministic: whether there is no dropout.

        Returns:
          By view name.
        """
        if context and self.options.dropping.keep < 1:
            return self._encode_dropping(
                concatenate(context), texts, views, keep_text, deterministic
            )
        tokens = concatenate([*context, *texts])
        kept_parts = [*context, *texts] if keep_text else context
        keep = sum(part.embeddings.shape[1] for part in kept_parts)
        plan = plan_attention(
            self.options,
            MaskTable(tuple(views)),
            tokens.metadata,
            tokens.metadata,
            keep=(0, keep),
        )
        x, layers = self.transformer(tokens.embeddings, plan, deterministic=deterministic)
        where = spans(tokens.metadata.groups)
        kept = tuple(g for g in tokens.metadata.groups if where[g.name].stop <= keep)
        metadata = jax.tree.map(lambda x: x[:, :keep], tokens.metadata).replace(groups=kept)
        cache = Cache(layers, metadata, jnp.array(keep, jnp.int32))
        names = [part.metadata.groups[0].name for part in context]
        written = [part.metadata.groups[0].name for part in texts]
        seen = {name: x[:, where[name]] for name in names}
        valid = {name: tokens.metadata.valid[:, where[name]] for name in names}
        return {
            view.name: Encoded(
                seen | ({"text": x[:, where[view.name]]} if view.name in written else {}),
                valid,
                cache,
                view.resolved,
            )
            for view in views
        }

    def _importance(self, x: Float[Array, "B N D"], metadata: TokenMetadata) -> Float[Array, "B N"]:
        """Returns what each token of the context is worth."""
        if self.options.dropping.by == "distinct":
            return distinctness(x, metadata)
        return self.scorer(x)  # type: ignore[no-any-return]

    def _encode_dropping(
        self,
        context: Tokens,
        texts: Sequence[Tokens],
        views: Sequence[View],
        keep_text: bool,
        deterministic: bool,
    ) -> dict[str, Encoded]:
        """Runs a pass as `encode_together` does, but drops the least important of the context.

        The context comes first, by itself; texts read the keys and values of what went on, in the
        layers before the drop too: so a cache has as many slots in all layers.
        """
        o, table = self.options, MaskTable(tuple(views))
        for group in context.metadata.groups:
            check_droppable(views[0], group, self.context_names)
        drop = o.dropping.after // o.blocks_per_period
        run = partial(self.transformer, deterministic=deterministic)

        def plan(metadata: TokenMetadata) -> AttentionPlan:
            keep = (0, metadata.valid.shape[1])
            return plan_attention(o, table, metadata, metadata, keep=keep)

        x, first = run(context.embeddings, plan(context.metadata), span=(0, drop))
        scores = self._importance(jax.lax.stop_gradient(x), context.metadata)
        slots, metadata = most_important(scores, context.metadata, o.dropping.keep)
        first = jax.tree.map(lambda each: rows_at(each, slots, each.ndim - 2), first)
        x = rows_at(x, slots, 1)
        x, rest = run(x, plan(metadata), span=(drop, o.periods))
        layers = join_periods(first, rest)
        if o.dropping.by == "learned":
            score = rows_at(scores, slots, 1)
            weight = 1 + (score - jax.lax.stop_gradient(score))
            layers, x = weighed(layers, weight), x * weight[..., None].astype(x.dtype)
        length = jnp.array(slots.shape[1], jnp.int32)
        cache = Cache(layers, metadata, length)
        where = spans(metadata.groups)
        seen = {name: x[:, span] for name, span in where.items()}
        valid = {name: metadata.valid[:, span] for name, span in where.items()}
        written: dict[str, Any] = {}
        if texts:
            text = concatenate(texts)
            both = join_metadata([metadata, text.metadata])
            count = text.embeddings.shape[1]
            longer = jax.tree.map(lambda each: with_slots(each, count), layers)
            reading = plan_attention(o, table, text.metadata, both, write_at=length)
            y, layers = run(text.embeddings, reading, longer)
            written = {name: y[:, span] for name, span in spans(text.metadata.groups).items()}
            if keep_text:
                cache = Cache(layers, both, length + count)
        return {
            view.name: Encoded(
                seen | ({"text": written[view.name]} if view.name in written else {}),
                valid,
                cache,
                view.resolved,
            )
            for view in views
        }

    def read_context(self, batch: Batch, view: View) -> Encoded:
        return self.encode_together(self.embed_context(batch), (), (view,))[view.name]

    def read_text(
        self, text: Mapping[str, Array], view: View, *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        tokens = self.embed_text(text, view.name)
        read = self.encode_together((), (tokens,), (view,), deterministic=deterministic)
        return read[view.name].text

    def prefix(self, batch: Batch, view: View) -> Cache:
        cache = self.read_context(batch, view).cache
        assert cache is not None
        return cache

    def prefill(
        self, batch: Batch, view: View, cache_room: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        context = self.embed_context(batch)
        after = sum(part.embeddings.shape[1] for part in context)
        text = self.embed_text(batch["text"], view.name, after)
        encoded = self.encode_together(context, (text,), (view,), keep_text=True)[view.name]
        assert encoded.cache is not None
        return encoded.text, encoded.cache.reserve(text_group(view, cache_room))

    def extend(
        self,
        cache: Cache,
        text: Mapping[str, Array],
        view: View,
        *,
        deterministic: bool = True,
        leave: Leave | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        tokens = self.embed_text(text, view.name, self.text_begins(cache, view))
        return self.write_on(cache, tokens, view, None, deterministic, leave)


def check_droppable(view: View, group: Group, contexts: Sequence[str]) -> None:
    """Checks that tokens of a context group may be dropped by what the whole group is.

    Raises:
      ValueError: the context sees the text, or its tokens are read in order or lie in documents.
    """
    rule = view.resolved
    if rule.context_view(contexts) is None:
        why = f"under rule {rule.name!r} the context sees the text, which would decide what it sees"
    elif group.start is None:
        why = f"{group.name} is placed by the data (documents, or a token within the text)"
    elif rule.between(group, group, (False, False))[0] != ALL:
        why = f"under rule {rule.name!r} tokens of {group.name} are read in order"
    else:
        return
    raise ValueError(f"model.dropping.keep: {why}, and earlier tokens would tell of later ones")


def join_periods(first: Any, rest: Any) -> Any:
    """Returns the keys and values of all periods, from those of the first and of the others."""

    def one(a: Any, b: Any) -> Any:
        return (*a, *b) if isinstance(a, tuple) else jnp.concatenate([a, b])

    return jax.tree.map(one, first, rest, is_leaf=lambda x: isinstance(x, tuple) and not is_pair(x))


def with_slots(x: Float[Array, "... K A"], count: int) -> Float[Array, "... slots A"]:
    """Returns keys or values with so many empty slots after them."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count), (0, 0)])
