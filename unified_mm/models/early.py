"""Early fusion: one transformer over one sequence, [context | text | text ...]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.models.unified import (
    Batch,
    Encoded,
    UnifiedModel,
    text_group,
    valid_by_name,
)
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import MaskTable, View, plan_passes
from unified_mm.nn.tokens import Tokens, concatenate, spans, take, unfold_items


class EarlyFusion(UnifiedModel):
    """A fusion in which all modalities are tokens of one transformer, under attention rules."""

    abilities: ClassVar[frozenset[str]] = frozenset({"contrastive", "captioning", "matching"})

    def embed_context(self, batch: Batch) -> list[Tokens]:
        """Returns the tokens of each context modality, before any layer, in sequence order."""
        parts: list[Tokens] = []
        for name in self.context_names:
            tokens = self.embed_apart(name, batch[name])
            before = _length(parts)
            parts.append(unfold_items(tokens.embeddings, tokens.metadata, batch[name], before))
        return parts

    def encode(
        self, batch: Batch, views: Sequence[View], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        encoded: dict[str, Encoded] = {}
        for sharing in plan_passes(views, self.context_names):
            context = self.embed_context(batch)
            after = _length(context)
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
        keep: int | None = None,
        deterministic: bool = True,
    ) -> dict[str, Encoded]:
        """Runs one pass over [context | text | text ...], the texts' groups named as their views.

        Returns:
          By view name; the cache holds the first `keep` tokens, by default the context.
        """
        tokens = concatenate([*context, *texts])
        keep = _length(context) if keep is None else keep
        plan = plan_attention(
            self.options,
            MaskTable(tuple(views)),
            tokens.metadata,
            tokens.metadata,
            keep=(0, keep),
        )
        x, layers = self.transformer(tokens.embeddings, plan, deterministic=deterministic)
        where = spans(tokens.metadata.groups)
        names = [part.metadata.groups[0].name for part in context]
        kept = [group.name for group in tokens.metadata.groups if where[group.name].stop <= keep]
        cache = Cache(layers, take(tokens.metadata, kept), jnp.array(keep, jnp.int32))
        valid = valid_by_name(tokens.metadata)
        written = {part.metadata.groups[0].name for part in texts}
        return {
            view.name: Encoded.of(
                x[:, where[view.name]] if view.name in written else None,
                {name: x[:, where[name]] for name in names},
                {name: valid[name] for name in names},
                cache,
                view,
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
        text = self.embed_text(batch["text"], view.name, _length(context))
        keep = _length([*context, text])
        encoded = self.encode_together(context, (text,), (view,), keep=keep)[view.name]
        assert encoded.cache is not None
        return encoded.text, encoded.cache.reserve(text_group(view, cache_room))

    def extend(
        self,
        cache: Cache,
        text: Mapping[str, Array],
        view: View,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        groups = cache.metadata.groups
        after = sum(group.length for group in groups if group.name != view.name)
        tokens = self.embed_text(text, view.name, after)
        return self.write_on(cache, tokens, view, None, deterministic)


def _length(parts: Sequence[Tokens]) -> int:
    return sum(part.embeddings.shape[1] for part in parts)
