"""Gated cross-attention: a language model that attends to resampled features of the context.

Alayrac et al. 2022, "Flamingo: a visual language model for few-shot learning".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.models.late import WithTowers
from unified_mm.models.unified import Batch, UnifiedModel, text_group
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.cross_attention import GATE, Memory
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import GateOptions, TransformerOptions
from unified_mm.nn.resampler import PerceiverResampler, ResamplerOptions
from unified_mm.nn.tokens import (
    TokenMetadata,
    Tokens,
    concatenate,
    single_document,
    take,
    unfold_items,
)
from unified_mm.nn.transformer import CROSS, Leave


class GatedCrossAttention(WithTowers):
    """Towers for the context, resamplers, and a language model with gated cross layers.

    The context never sees the text. The text sees of the context what its rule allows: under
    'separate' nothing, so that the contrastive objective gets text alone; under
    'interleaved_latest' the latest image.

    Attributes:
      resampler: of each context modality's features; with 0 latents text attends to all of them.
      steps: of each modality whose tokens are of several moments, how many, the earliest first.
    """

    resampler: ResamplerOptions
    steps: tuple[tuple[str, int], ...] = ()

    abilities: ClassVar[frozenset[str]] = frozenset({"contrastive", "captioning"})

    @classmethod
    def from_config(cls, model: Any, modalities: Any, heads: Any, **more: Any) -> UnifiedModel:
        built: Any = super().from_config(model, modalities, heads, resampler=None, **more)
        if model.cross.every < 1:
            raise ValueError(f"model.cross.every={model.cross.every}: must be at least 1")
        for name, each in built.own_towers:
            if each.width != built.tower.width:
                raise ValueError(
                    f"model.towers.{name}.width={each.width}: what gated cross-attention looks at "
                    f"has one width, that of model.tower ({built.tower.width})"
                )
        options = replace(built.options, cross=GateOptions(**model.cross))
        resampler = ResamplerOptions.from_config(model.resampler, built.tower.width, options)
        steps = tuple((name, m.steps) for name, m in modalities.items() if hasattr(m, "steps"))
        return built.clone(options=options, resampler=resampler, steps=steps)

    def setup(self) -> None:
        super().setup()
        if self.resampler.latents:
            self.resamplers = {
                name: PerceiverResampler(self.resampler) for name in self.context_names
            }

    def with_options(self, **changes: Any) -> UnifiedModel:
        resampler = replace(self.resampler, blocks=replace(self.resampler.blocks, **changes))
        return super().with_options(**changes).clone(resampler=resampler)

    @property
    def cross_options(self) -> TransformerOptions:
        """The options of the cross layers: a window is of the text's own tokens."""
        return replace(self.options, window=0)

    def read_text(
        self, text: Mapping[str, Array], view: View, *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        tokens = self.embed_text(text, view.name)
        rows = tokens.embeddings.shape[0]
        features = jnp.zeros((rows, 0, self.tower.width), self.options.dtype)
        nothing = Memory(features, None, take(tokens.metadata, ()))
        return self.read(tokens, nothing, (view,), deterministic=deterministic)[0]

    def prefix(self, batch: Batch, view: View) -> Cache:
        memory = self.memory(self.look_at_all(batch), batch)
        # An invalid token is run: that computes the cross layers' keys and values.
        absent = jnp.zeros((memory.metadata.valid.shape[0], 1), bool)
        text = {"ids": absent.astype(jnp.int32), "valid": absent, "present": absent[:, 0]}
        tokens = self.embed_text(text, view.name, memory.length)
        _, layers = self.read(tokens, memory, (view,))
        return _beside(memory, layers, take(tokens.metadata, ()))

    def prefill(
        self, batch: Batch, view: View, cache_room: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        memory = self.memory(self.look_at_all(batch), batch)
        tokens = self.embed_text(batch["text"], view.name, memory.length)
        length = tokens.embeddings.shape[1]
        x, layers = self.read(tokens, memory, (view,), keep=(0, length))
        cache = _beside(memory, layers, tokens.metadata)
        return x, cache.reserve(text_group(view, cache_room))

    def extend(
        self,
        cache: Cache,
        text: Mapping[str, Array],
        view: View,
        *,
        deterministic: bool = True,
        leave: Leave | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        assert cache.memory is not None
        tokens = self.embed_text(text, view.name, self.text_begins(cache, view))
        cross = plan_attention(
            self.cross_options, MaskTable((view,)), tokens.metadata, cache.memory.metadata
        )
        with_memory = cache.replace(layers=cache.layers | {CROSS: cache.memory.layers})  # type: ignore[attr-defined]
        x, written = self.write_on(with_memory, tokens, view, cross, deterministic, leave)
        layers = {name: kept for name, kept in written.layers.items() if name != CROSS}
        return x, written.replace(layers=layers)  # type: ignore[attr-defined]

    def param_metrics(self, params: Any) -> dict[str, Array]:
        """Returns how far each gate is open: the mean of |g(alpha)| by layer."""
        layers = params["transformer"]["layers"][CROSS]
        found = {}
        for kind in ("attention", "feed_forward"):
            opened = jnp.abs(GATE[self.options.cross.gate](layers[f"{kind}_gate"])).mean(-1)
            for period in range(opened.shape[0]):
                found[f"gate/{kind}_{period}"] = opened[period]
        return found

    def memory(self, looked: Mapping[str, Tokens], batch: Batch) -> Memory:
        parts: list[Tokens] = []
        for name, features in looked.items():
            x, metadata = features.embeddings, features.metadata
            if self.resampler.latents:
                present = metadata.valid.any(1)
                shape = x.shape[0], dict(self.steps).get(name, 1), -1
                x = self.resamplers[name](
                    x.reshape(*shape, x.shape[2]), metadata.valid.reshape(shape)
                )
                group = metadata.groups[0]._replace(length=x.shape[1])
                valid = jnp.broadcast_to(present[:, None], x.shape[:2])
                metadata = single_document(valid, group)
            before = sum(part.embeddings.shape[1] for part in parts)
            parts.append(unfold_items(x, metadata, batch[name], before))
        memory = concatenate(parts)
        return Memory(memory.embeddings, None, memory.metadata)

    def read(
        self,
        tokens: Tokens,
        memory: Memory | None,
        views: Sequence[View],
        *,
        keep: tuple[int, int] = (0, 0),
        **more: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        assert memory is not None
        o, table, text = self.options, MaskTable(tuple(views)), tokens.metadata
        plan = plan_attention(o, table, text, text, keep=keep)
        cross = plan_attention(
            self.cross_options, table, text, memory.metadata, features=memory.features
        )
        return self.transformer(tokens.embeddings, plan, cross=cross, **more)


def _beside(memory: Memory, layers: Any, metadata: TokenMetadata) -> Cache:
    """Returns a cache of text tokens with the memory that they attend to, as keys and values."""
    kept = {name: pair for name, pair in layers.items() if name != CROSS}
    seen = memory.replace(features=None, layers=layers[CROSS])  # type: ignore[attr-defined]
    length = jnp.array(metadata.valid.shape[1], jnp.int32)
    return Cache(kept, metadata, length, seen)
