"""UnifiedModel: the interface of every fusion to objectives and inference.

A fusion is a subclass in a file of its own and a line in `FUSIONS`. All of them turn modalities
into tokens and read text under attention rules; they differ in where text meets the context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
from flax import struct
from jaxtyping import Array, Float

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.backends import is_kernel
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import AttentionRule, MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.places import PlaceEmbedding
from unified_mm.nn.tokens import (
    Group,
    Tokens,
    fold_items,
    offset_positions,
    with_positions,
)
from unified_mm.nn.transformer import Leave, Transformer
from unified_mm.registry import resolve

FUSIONS = {
    "early": "unified_mm.models.early:EarlyFusion",
    "early_features": "unified_mm.models.features:EarlyFeatures",
    "gated_cross_attention": "unified_mm.models.gated:GatedCrossAttention",
    "late": "unified_mm.models.late:LateFusion",
}
ABLE = """
    fusion                  contrastive        captioning      answering       matching
    early                   rule 'separate'    rule 'prefix'   with a prompt   text reads the image
    early_features          as early, on features of towers
    gated_cross_attention   image features     yes             with a prompt   no
                            and text alone
    late                    yes                no              no              no
"""

Batch = Mapping[str, Mapping[str, Array]]


@struct.dataclass
class Encoded:
    """The output of one pass for one view: a text and its context.

    Attributes:
      outputs: contextual embeddings [B, N, D] by modality, text among them unless it was not read.
      valid: bool [B, N] by context modality, which of its tokens are valid.
      cache: of the context, so that more text can be read with it; None where a fusion saves none.
      rule: the attention rule of the pass; static.
    """

    outputs: dict[str, Any]
    valid: dict[str, Any]
    cache: Cache | None
    rule: AttentionRule = struct.field(pytree_node=False)

    @property
    def text(self) -> Any:
        """The contextual embeddings of the text, [B, T, D]; None where there was none."""
        return self.outputs.get("text")


class UnifiedModel(nn.Module):
    """The base of all fusions: modalities, the main transformer, and heads.

    Attributes:
      modalities: by name, in sequence order, text last.
      options: shape of the main transformer, the one that reads text.
      heads: modules that objectives add, by objective (projections, classifiers).
    """

    modalities: Mapping[str, Any]
    options: TransformerOptions
    heads: Mapping[str, nn.Module]

    # Kinds of objectives that this fusion can serve.
    abilities: ClassVar[frozenset[str]] = frozenset()
    # Whether it reads a picture at the place of the token that stands for it.
    places_pictures: ClassVar[bool] = False
    # Whether it drops tokens of the context after a layer (`model.dropping`).
    drops_context: ClassVar[bool] = False
    # Whether the same parameters write with no context at all (`inference.question_only`).
    reads_text_alone: ClassVar[bool] = False

    @classmethod
    def from_config(
        cls, model: Any, modalities: Mapping[str, Any], heads: Mapping[str, nn.Module]
    ) -> UnifiedModel:
        """Returns the model of `config.model`."""
        return cls(
            modalities=modalities, options=TransformerOptions.from_config(model), heads=heads
        )

    def setup(self) -> None:
        self.embedders = {
            name: modality.embedder(self.width_of(name), self.options.dtype)
            for name, modality in self.modalities.items()
        }
        if self.options.places:
            widths = {self.width_of(name) for name in self.context_names}
            if len(widths) > 1:
                raise ValueError(
                    f"model.places={self.options.places!r} is one map for all modalities, and "
                    f"their towers have the widths {sorted(widths)}: give them one"
                )
            width = widths.pop() if widths else self.options.width
            self.places = PlaceEmbedding(self.options.places, width, self.options.dtype)
        for name in {name for each in self.stacks.values() for name in each.patterns}:
            if name not in self.modalities:
                raise ValueError(
                    f"model.sparse.{name}: the model has no such modality, only "
                    f"{', '.join(self.modalities)}"
                )
        few = [
            name
            for each in self.stacks.values()
            if each.feed_forward_type == "neurons"
            for name in each.own("of", ())
        ]
        for name in set(few) - set(self.modalities):
            raise ValueError(
                f"feed_forward_options.of={few}: the model has no modality {name!r}, only "
                f"{', '.join(self.modalities)}"
            )
        self.transformer = Transformer(self.options)
        self.head = dict(self.heads)

    def width_of(self, name: str) -> int:
        """Returns the width of a modality's embeddings."""
        return self.options.width

    @property
    def context_names(self) -> tuple[str, ...]:
        """The names of all modalities but text, in sequence order."""
        return tuple(name for name in self.modalities if name != "text")

    def encode(
        self, batch: Batch, views: Sequence[View], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        """Encodes the text once for each view, and the context once for all that can share it.

        Args:
          batch: arrays by modality.
          views: the ways to read the text, each with a rule.
          deterministic: whether there is no dropout.

        Returns:
          By view name.
        """
        raise NotImplementedError

    def read_context(self, batch: Batch, view: View) -> Encoded:
        """Encodes the context alone, under the rule of `view`."""
        raise NotImplementedError

    def read_text(
        self, text: Mapping[str, Array], view: View, *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Returns contextual embeddings of text alone, under the rule of `view`."""
        raise NotImplementedError

    def prefix(self, batch: Batch, view: View) -> Cache:
        """Returns a cache of the context alone, without slots for text."""
        raise NotImplementedError

    def prefill(
        self, batch: Batch, view: View, cache_room: int
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Encodes the context and the beginning of a text.

        Args:
          batch: arrays by modality.
          view: the rule of the text.
          cache_room: how many more text tokens the cache has slots for.

        Returns:
          Contextual embeddings of the text, and the cache.
        """
        raise NotImplementedError

    def extend(
        self,
        cache: Cache,
        text: Mapping[str, Array],
        view: View,
        *,
        deterministic: bool = True,
        leave: Leave | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Encodes more text tokens, which attend to what the cache holds.

        Args:
          cache: with slots for them.
          text: `ids`, `valid` [B, T], `present` [B], and `text_position` [B, T] where they do not
            begin the text; in documents `position`, `segment` and `document` [B, T] too.
          view: the rule of the text.
          deterministic: whether there is no dropout.
          leave: which examples leave the main transformer at each of its exits.

        Returns:
          Contextual embeddings [B, T, D], and the cache with the tokens in it.
        """
        raise NotImplementedError

    def logits(self, x: Float[Array, "B T D"], of: str = "text") -> Float[Array, "B T V"]:
        """Returns the float32 logits of the next tokens of a modality, `of`.

        Raises:
          ValueError: the embedder of the modality has no logits.
        """
        embedder = self.embedders[of]
        if not hasattr(embedder, "logits"):
            raise ValueError(f"model.modalities.{of} has no logits: it can be read, not written")
        found: Array = embedder.logits(x)
        return found

    def text_begins(self, cache: Cache, view: View) -> int:
        """Returns the position at which a view's text begins after the context of a cache."""
        before = [group for group in cache.metadata.groups if group.name != view.name]
        beside = 0 if cache.memory is None else int(cache.memory.length)
        return beside + sum(group.places or group.length for group in before)

    def exit_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of next tokens by the residual stream after an exit."""
        return self.logits(self.transformer.normed(x))

    @property
    def stacks(self) -> dict[str, TransformerOptions]:
        """The shape of each transformer, by its name among the parameters."""
        return {"transformer": self.options}

    @property
    def together(self) -> int:
        """The number of neighbouring examples that layers compute together, in fixed groups."""
        return math.lcm(*(each.own("group", 1) for each in self.stacks.values()))

    def with_options(self, **changes: Any) -> UnifiedModel:
        """Returns the model with other options of all its transformers, for the same parameters.

        A head that has a transformer has a method `with_options`, too, and takes what is for it.
        """
        heads = {
            name: head.with_options(**changes) if hasattr(head, "with_options") else head
            for name, head in self.heads.items()
        }
        return self.clone(options=replace(self.options, **changes), heads=heads)

    def without_recomputation(self) -> UnifiedModel:
        """Returns the model without recomputation and kernels, for counting FLOPs.

        Of sparse attention the listed blocks count, where blocks compute it; what a kernel leaves
        out counts as if it were computed.
        """
        return self.with_options(remat="none", counted=True, pipeline=None)

    def for_inference(self) -> UnifiedModel:
        """Returns the model for inference, where no example depends on another.

        Attention is by 'auto' instead of a kernel by name: it may run on another device than in
        training, and attends to a cache. Few neurons are gathered.
        """
        kernel = any(is_kernel(each.attention) for each in self.stacks.values())
        attention = {"attention": "auto"} if kernel else {}
        return self.with_options(gathered=True, **attention)

    def pipelined(self, pipeline: Pipeline) -> UnifiedModel:
        """Returns the model with its transformers divided into pipeline stages."""
        return self.with_options(pipeline=pipeline)

    def param_metrics(self, params: Any) -> dict[str, Array]:
        """Returns numbers about the parameters for the metrics, each []."""
        return {}

    def embed_items(self, name: str, arrays: Mapping[str, Array]) -> Tokens:
        """Returns the tokens of a context modality's items before any layer, one item a row."""
        tokens: Tokens = self.embedders[name](fold_items(arrays))
        if self.options.places and tokens.metadata.time is not None:
            tokens = self.places(tokens)
        return tokens

    def embed_text(self, text: Mapping[str, Array], name: str, after: int = 0) -> Tokens:
        """Returns the tokens of `text` before any layer, as the group `name`.

        Their positions are those of the batch, or else begin after `after` tokens.
        """
        tokens = self.embedders["text"](text)
        group = tokens.metadata.groups[0]._replace(name=name)
        metadata = tokens.metadata.replace(groups=(group,))  # type: ignore[attr-defined]
        if "text_position" in text and "position" not in text:
            metadata = with_positions(metadata, position=text["text_position"])
        metadata = offset_positions(metadata, text, after)
        if "position" in text:  # of documents, whose texts are laid out in order
            ordered = tuple(each._replace(ordered=True) for each in metadata.groups)
            metadata = metadata.replace(groups=ordered)  # type: ignore[attr-defined]
        return tokens.replace(metadata=metadata)  # type: ignore[attr-defined]

    def write_on(
        self,
        cache: Cache,
        tokens: Tokens,
        view: View,
        cross: Any,
        deterministic: bool,
        leave: Leave | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Runs the main transformer on new tokens with a cache, and writes them into it."""
        metadata = cache.write_metadata(tokens.metadata)
        plan = plan_attention(
            self.options,
            MaskTable((view,)),
            tokens.metadata,
            metadata,
            write_at=cache.length,
        )
        x, layers = self.transformer(
            tokens.embeddings,
            plan,
            cache.layers,
            cross=cross,
            deterministic=deterministic,
            leave=leave,
        )
        length = cache.length + x.shape[1]
        return x, cache.replace(layers=layers, metadata=metadata, length=length)  # type: ignore[attr-defined]


def fusion(name: str) -> type[UnifiedModel]:
    """Returns the class of a fusion, by its name or `package.module:CLASS`.

    Raises:
      ValueError: the name is unknown; the message has the table of fusions.
    """
    if name not in FUSIONS and ":" not in name:
        raise ValueError(f"model.fusion={name!r} is unknown. What there is:\n{ABLE}")
    found: type[UnifiedModel] = resolve("fusion", name, FUSIONS)
    return found


def text_group(view: View, length: int, begins: int = 0) -> Group:
    """Returns the token group of a view's text in a cache, which begins at a position."""
    return Group(view.name, "text", length, first=begins)
