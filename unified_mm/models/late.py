"""Late fusion: a tower for each modality, which meet only in their objective (CLIP, ALIGN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from jaxtyping import Array, Float

from unified_mm.modalities.tokens import Tokens, concatenate, spans, together
from unified_mm.models.attention import plan_attention
from unified_mm.models.masks import Stream, Visibility
from unified_mm.models.towers import WithTowers
from unified_mm.models.unified import Batch, Encoded


class LateFusion(WithTowers):
    """Two (or more) towers (Radford et al. 2021): no token of one modality sees another's."""

    abilities: ClassVar[frozenset[str]] = frozenset({"contrastive"})

    def encode(
        self, batch: Batch, streams: Sequence[Stream], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        context = self._look_at_all(batch, deterministic)
        texts = [self.embed_text(batch["text"], stream.name) for stream in streams]
        tokens = concatenate(texts)
        visibility = Visibility(tuple(streams))
        plan = plan_attention(self.options, visibility, tokens.metadata, tokens.metadata)
        x, _ = self.transformer(tokens.embeddings, plan, deterministic=deterministic)
        where = spans(tokens.metadata.groups)
        return {
            stream.name: _encoded(x[:, where[stream.name]], context, stream) for stream in streams
        }

    def read_context(self, batch: Batch, stream: Stream) -> Encoded:
        return _encoded(None, self._look_at_all(batch, True), stream)

    def read_text(self, text: Mapping[str, Array], stream: Stream) -> Float[Array, "B T D"]:
        tokens = self.embed_text(text, stream.name)
        visibility = Visibility((stream,))
        plan = plan_attention(self.options, visibility, tokens.metadata, tokens.metadata)
        return self.transformer(tokens.embeddings, plan)[0]

    def _look_at_all(self, batch: Batch, deterministic: bool) -> dict[str, Tokens]:
        found = {}
        for name in self.context_names:
            features = self.look(name, batch, deterministic=deterministic)
            found[name] = together(features.embeddings, features.metadata, batch[name], 0)
        return found


def _encoded(text: Array | None, context: Mapping[str, Tokens], stream: Stream) -> Encoded:
    return Encoded(
        text=text,
        context={name: tokens.embeddings for name, tokens in context.items()},
        context_valid={name: tokens.metadata.valid for name, tokens in context.items()},
        cache=None,
        rule=stream.resolved(),
    )
