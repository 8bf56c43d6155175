"""Early fusion: one transformer over one sequence, [context | text | text ...]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.models.unified import (
    Batch,
    Encoded,
    UnifiedModel,
    text_group,
)
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import MaskTable, View, plan_passes
from unified_mm.nn.tokens import Tokens, concatenate, spans, unfold_items
from unified_mm.nn.transformer import Leave


class EarlyFusion(UnifiedModel):
    """A fusion in which all modalities are tokens of one transformer, under attention rules."""

    abilities: ClassVar[frozenset[str]] = frozenset({"contrastive", "captioning", "matching"})

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

    def read_context(self, batch: Batch, view: View) -> Encoded:
        return self.encode_together(self.embed_context(batch), (), (view,))[view.name]

    def read_text(self, text: Mapping[str, Array], view: View) -> Float[Array, "B T D"]:
        tokens = self.embed_text(text, view.name)
        return self.encode_together((), (tokens,), (view,))[view.name].text

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
        groups = cache.metadata.groups
        after = sum(group.length for group in groups if group.name != view.name)
        tokens = self.embed_text(text, view.name, after)
        return self.write_on(cache, tokens, view, None, deterministic, leave)
