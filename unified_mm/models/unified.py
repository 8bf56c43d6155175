"""UnifiedModel: what every fusion offers to objectives and to inference.

A fusion is a subclass in a file of its own and a line in `FUSIONS`. All of them turn modalities
into tokens and read text under attention rules; they differ in where text meets the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.backends import is_kernel
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import AttentionRule, MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.tokens import (
    Group,
    TokenMetadata,
    Tokens,
    fold_items,
    offset_positions,
    spans,
    with_positions,
)
from unified_mm.nn.transformer import Transformer
from unified_mm.registry import resolve

FUSIONS = {
    "early": "unified_mm.models.early:EarlyFusion",
    "gated_cross_attention": "unified_mm.models.gated:GatedCrossAttention",
    "late": "unified_mm.models.late:LateFusion",
}
ABLE = """
    fusion                  contrastive        captioning      answering       matching
    early                   rule 'separate'    rule 'prefix'   with a prompt   text reads the image
    gated_cross_attention   image features     yes             with a prompt   no
                            and text alone
    late                    yes                no              no              no
"""

Batch = Mapping[str, Mapping[str, Array]]


@struct.dataclass
class Encoded:
    """What one pass says of one text and of the context it was read beside.

    Attributes:
      outputs: contextual embeddings [B, N, D] by modality, of all that was read or written.
      valid: bool [B, N] by context modality, which of its tokens are there.
      cache: what further text needs to be read beside the same context; None in late fusion.
      rule: the rule it was read under; static.
    """

    outputs: dict[str, Any]
    valid: dict[str, Any]
    cache: Cache | None
    rule: AttentionRule = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls,
        text: Array | None,
        context: Mapping[str, Array],
        valid: Mapping[str, Array],
        cache: Cache | None,
        view: View,
    ) -> Encoded:
        """Returns what a pass says of a view's text (None without one) and of its context."""
        written = {} if text is None else {"text": text}
        return cls({**context, **written}, dict(valid), cache, view.resolved())

    @property
    def text(self) -> Any:
        """[B, T, D] of the text; None where there was none."""
        return self.outputs.get("text")


class UnifiedModel(nn.Module):
    """The part that all fusions share: modalities, the main transformer, and heads.

    Attributes:
      modalities: by name, in sequence order, text last.
      options: shape of the main transformer, the one that reads text.
      heads: what objectives add on top, by name (projections, classifiers).
    """

    modalities: Mapping[str, Any]
    options: TransformerOptions
    heads: Mapping[str, nn.Module]

    # Kinds of objectives that this fusion can serve.
    abilities: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(
        cls, model: Any, modalities: Mapping[str, Any], heads: Mapping[str, nn.Module]
    ) -> UnifiedModel:
        """Built from `config.model`."""
        return cls(
            modalities=modalities, options=TransformerOptions.from_config(model), heads=heads
        )

    def setup(self) -> None:
        self.embedders = {
            name: modality.embedder(self.width_of(name), self.options.dtype)
            for name, modality in self.modalities.items()
        }
        self.transformer = Transformer(self.options)
        self.head = dict(self.heads)

    def width_of(self, name: str) -> int:
        """Width of a modality's embeddings."""
        return self.options.width

    @property
    def context_names(self) -> tuple[str, ...]:
        """Every modality but text, in sequence order."""
        return tuple(name for name in self.modalities if name != "text")

    def encode(
        self, batch: Batch, views: Sequence[View], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        """Read the batch's text once for each stream, the context once for all that can share it.

        Args:
          batch: arrays by modality.
          streams: the texts to read and their rules.

        Returns:
          By stream name.
        """
        raise NotImplementedError

    def read_context(self, batch: Batch, view: View) -> Encoded:
        """The context alone, as `view` would read it."""
        raise NotImplementedError

    def read_text(self, text: Mapping[str, Array], view: View) -> Float[Array, "B T D"]:
        """Text alone, as `view` reads it where there is no context."""
        raise NotImplementedError

    def prefix(self, batch: Batch, view: View) -> Cache:
        """A cache of the context alone, for any texts beside it; without room for them."""
        raise NotImplementedError

    def prefill(
        self, batch: Batch, view: View, cache_room: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The context and the beginning of a text; the cache has room for so many more tokens."""
        raise NotImplementedError

    def extend(
        self,
        cache: Cache,
        text: Mapping[str, Array],
        view: View,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Read further text tokens beside what the cache holds.

        Args:
          cache: with room for them.
          text: `ids`, `valid` [B, T], `present` [B], and `text_position` [B, T] where they do not
            begin the text; in documents their placement too.

        Returns:
          Contextual embeddings [B, T, D], and the cache with the tokens in it.
        """
        raise NotImplementedError

    def logits(self, x: Float[Array, "B T D"], of: str = "text") -> Float[Array, "B T V"]:
        """Returns the scores of each next token of a modality that has a head, float32.

        Raises:
          ValueError: the modality has none, so that it can be read and not written.
        """
        embedder = self.embedders[of]
        if not hasattr(embedder, "logits"):
            raise ValueError(f"model.modalities.{of} has no logits: it can be read, not written")
        found: Array = embedder.logits(x)
        return found

    def with_options(self, **changes: Any) -> UnifiedModel:
        """The same model with other options of all its transformers, its parameters alike."""
        return self.clone(options=replace(self.options, **changes))

    def without_recomputation(self) -> UnifiedModel:
        """The same model, keeping what it would recompute: for counting what has to be done."""
        # Nor is anything in a kernel, where products cannot be counted.
        return self.with_options(remat="none", attention="xla", pipeline=None)

    def for_inference(self) -> UnifiedModel:
        """The same model where no attention kernel is asked for by name: for inference.

        It may be asked on another device than it was trained on, and reads on beside a cache.
        """
        kernel = is_kernel(self.options.attention)
        return self.with_options(attention="auto") if kernel else self

    def pipelined(self, pipeline: Pipeline) -> UnifiedModel:
        """The same model, its transformers divided into stages."""
        return self.with_options(pipeline=pipeline)

    def param_metrics(self, params: Any) -> dict[str, Array]:
        """Numbers about the parameters that are worth a line in the metrics, each []."""
        return {}

    def embed_apart(self, name: str, arrays: Mapping[str, Array]) -> Tokens:
        """Tokens of a context modality before any layer, each picture in a row of its own."""
        return self.embedders[name](fold_items(arrays))

    def embed_text(self, text: Mapping[str, Array], name: str, after: int = 0) -> Tokens:
        """Tokens of `text` as the group `name`, `after` tokens later where the batch is silent."""
        tokens = self.embedders["text"](text)
        group = tokens.metadata.groups[0]._replace(name=name)
        metadata = tokens.metadata.replace(groups=(group,))  # type: ignore[attr-defined]
        if "text_position" in text and "position" not in text:
            metadata = with_positions(metadata, position=text["text_position"])
        return tokens.replace(metadata=offset_positions(metadata, text, after))  # type: ignore[attr-defined]

    def write_on(
        self,
        cache: Cache,
        tokens: Tokens,
        view: View,
        cross: Any,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run the main transformer on new tokens beside a cache, and write them into it."""
        metadata = cache.write_metadata(tokens.metadata)
        plan = plan_attention(
            self.options,
            MaskTable((view,)),
            tokens.metadata,
            metadata,
            write_at=cache.length,
        )
        x, layers = self.transformer(
            tokens.embeddings, plan, cache.layers, cross=cross, deterministic=deterministic
        )
        length = cache.length + x.shape[1]
        return x, cache.replace(layers=layers, metadata=metadata, length=length)  # type: ignore[attr-defined]


def fusion(name: str) -> type[UnifiedModel]:
    """The class of a fusion.

    Raises:
      ValueError: an unknown name, with the table of what there is.
    """
    if name not in FUSIONS and ":" not in name:
        raise ValueError(f"model.fusion={name!r} is unknown. What there is:\n{ABLE}")
    found: type[UnifiedModel] = resolve("fusion", name, FUSIONS)
    return found


def text_group(view: View, length: int) -> Group:
    """Where a cache keeps the text of a stream."""
    return Group(view.name, "text", length)


def valid_by_name(metadata: TokenMetadata) -> dict[str, Bool[Array, "B N"]]:
    """Which tokens of each group are there."""
    return {name: metadata.valid[:, where] for name, where in spans(metadata.groups).items()}
