"""UnifiedModel: every modality as tokens of one transformer, read under attention rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from unified_mm.modalities.tokens import Group, TokenMetadata, Tokens, concatenate, shift, spans
from unified_mm.models.attention import Cache, plan_attention
from unified_mm.models.masks import AttentionRule, Stream, Visibility, plan_passes
from unified_mm.models.transformer import Transformer, TransformerOptions

Batch = Mapping[str, Mapping[str, Array]]


@struct.dataclass
class Encoded:
    """What one pass says of one text and of the context it was read beside.

    Attributes:
      text: [B, T, D] contextual embeddings of the text.
      context: by modality, [B, N, D].
      cache: keys and values of the context.
      rule: the rule it was read under; static.
    """

    text: Any
    context: dict[str, Any]
    cache: Cache
    rule: AttentionRule = struct.field(pytree_node=False)


class UnifiedModel(nn.Module):
    """Early fusion: one transformer over [context | text | text ...].

    Attributes:
      modalities: by name, in sequence order, text last.
      options: the transformer's shape.
      heads: what objectives add on top, by name (projections, classifiers).
    """

    modalities: Mapping[str, Any]
    options: TransformerOptions
    heads: Mapping[str, nn.Module]

    def setup(self) -> None:
        o = self.options
        self.embedders = {
            name: modality.embedder(o.width, o.dtype) for name, modality in self.modalities.items()
        }
        self.transformer = Transformer(o)
        self.head = dict(self.heads)

    @property
    def context_names(self) -> tuple[str, ...]:
        """Every modality but text, in sequence order."""
        return tuple(name for name in self.modalities if name != "text")

    def embed_context(self, batch: Batch) -> list[Tokens]:
        """Tokens of each context modality, before any layer."""
        return [self.embedders[name](batch[name]) for name in self.context_names]

    def embed_text(self, text: Mapping[str, Array], name: str, start: Array | int = 0) -> Tokens:
        """Tokens of `text` (`ids`, `valid` [B, T], `present` [B]) as the group `name`."""
        tokens = self.embedders["text"](text, start)
        group = tokens.metadata.groups[0]._replace(name=name)
        return tokens.replace(metadata=tokens.metadata.replace(groups=(group,)))  # type: ignore[attr-defined]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of each next text token, float32."""
        return self.embedders["text"].logits(x)

    def encode(
        self, batch: Batch, streams: Sequence[Stream], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        """Read the batch's text once for each stream, the context once for all that can share it.

        Args:
          batch: arrays by modality.
          streams: the texts to read and their rules.

        Returns:
          By stream name.
        """
        encoded: dict[str, Encoded] = {}
        for together in plan_passes(streams, self.context_names):
            texts = [self.embed_text(batch["text"], stream.name) for stream in together]
            encoded |= self.encode_together(
                self.embed_context(batch), texts, together, deterministic=deterministic
            )
        return encoded

    def encode_together(
        self,
        context: Sequence[Tokens],
        texts: Sequence[Tokens],
        streams: Sequence[Stream],
        *,
        deterministic: bool = True,
    ) -> dict[str, Encoded]:
        """One pass over [context | text | text ...], the texts named as their streams."""
        length = sum(part.embeddings.shape[1] for part in context)
        later = [
            text.replace(metadata=shift(text.metadata, length))  # type: ignore[attr-defined]
            for text in texts
        ]
        tokens = concatenate([*context, *later])
        plan = plan_attention(
            Visibility(tuple(streams)), tokens.metadata, tokens.metadata, keep=(0, length)
        )
        x, (keys, values) = self.transformer(
            tokens.embeddings, plan, deterministic=deterministic
        )
        where = spans(tokens.metadata.groups)
        cache = Cache(
            keys, values, _head(tokens.metadata, length), jnp.array(length, jnp.int32)
        )
        by_name = {name: x[:, where[name]] for name in self.context_names if name in where}
        return {
            stream.name: Encoded(x[:, where[stream.name]], by_name, cache, stream.resolved())
            for stream in streams
        }

    def extend(
        self,
        cache: Cache,
        text: Mapping[str, Array],
        stream: Stream,
        *,
        start: Array | int = 0,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Read further text tokens beside what the cache holds.

        Args:
          cache: with room reserved for them, as the group `stream.name`.
          text: `ids`, `valid` [B, T] and `present` [B].
          start: [], how many tokens of this text were read before.

        Returns:
          Contextual embeddings [B, T, D], and the cache with the tokens in it.
        """
        tokens = self.embed_text(text, stream.name, start)
        length = sum(g.length for g in cache.metadata.groups if g.name != stream.name)
        queries = shift(tokens.metadata, length)
        metadata = cache.write_metadata(queries)
        plan = plan_attention(Visibility((stream,)), queries, metadata, write_at=cache.length)
        x, (keys, values) = self.transformer(
            tokens.embeddings, plan, (cache.keys, cache.values), deterministic=deterministic
        )
        return x, Cache(keys, values, metadata, cache.length + x.shape[1])

    def read_context(self, batch: Batch, stream: Stream) -> tuple[dict[str, Array], Cache]:
        """The context alone, as `stream` would read it: embeddings by modality, and the cache."""
        context = concatenate(self.embed_context(batch))
        length = context.embeddings.shape[1]
        plan = plan_attention(
            Visibility((stream,)), context.metadata, context.metadata, keep=(0, length)
        )
        x, (keys, values) = self.transformer(context.embeddings, plan)
        where = spans(context.metadata.groups)
        cache = Cache(keys, values, context.metadata, jnp.array(length, jnp.int32))
        return {name: x[:, where[name]] for name in self.context_names}, cache

    def read_text(self, text: Mapping[str, Array], stream: Stream) -> Float[Array, "B T D"]:
        """Text alone, as `stream` reads it where there is no context."""
        return self.encode_together([], [self.embed_text(text, stream.name)], (stream,))[
            stream.name
        ].text


def text_group(stream: Stream, length: int) -> Group:
    """Where a cache keeps the text of a stream."""
    return Group(stream.name, "text", length)


def _head(metadata: TokenMetadata, length: int) -> TokenMetadata:
    """Metadata of the first `length` tokens, which end where a group ends."""
    groups, total = [], 0
    for group in metadata.groups:
        if total == length:
            break
        groups.append(group)
        total += group.length
    return TokenMetadata(
        position=metadata.position[:, :length],
        segment=metadata.segment[:, :length],
        document=metadata.document[:, :length],
        valid=metadata.valid[:, :length],
        groups=tuple(groups),
    )
