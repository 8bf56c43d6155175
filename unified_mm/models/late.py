"""Late fusion: a tower for each modality; they meet only in the objective (CLIP, ALIGN)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from jaxtyping import Array, Float

from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.cross_attention import Memory
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import (
    Group,
    Tokens,
    concatenate,
    fold_items,
    single_document,
    spans,
    unfold_items,
)
from unified_mm.nn.transformer import Transformer

ALONE = MaskTable((View("none", "separate"),))


class WithTowers(UnifiedModel):
    """The base of late and gated fusion: each context modality has a tower of its own.

    Attributes:
      tower: shape of the towers.
      own_towers: (modality, shape) of the towers that have another shape.
    """

    tower: TransformerOptions
    own_towers: tuple[tuple[str, TransformerOptions], ...]

    @classmethod
    def from_config(cls, model: Any, modalities: Any, heads: Any, **more: Any) -> UnifiedModel:
        options = TransformerOptions.from_config(model)
        tower = replace(options, exits=()).changed(model.tower)
        for name in model.towers:
            if name not in modalities or name == "text":
                raise ValueError(f"model.towers.{name}: model.modalities has no such context")
        own = tuple((name, tower.changed(each)) for name, each in model.towers.items())
        more["own_towers"] = own
        return cls(modalities=modalities, options=options, heads=heads, tower=tower, **more)

    def setup(self) -> None:
        super().setup()
        self.towers = {name: Transformer(self.tower_of(name)) for name in self.context_names}

    def tower_of(self, name: str) -> TransformerOptions:
        """Returns the shape of a context modality's tower."""
        return dict(self.own_towers).get(name, self.tower)

    def width_of(self, name: str) -> int:
        return self.options.width if name == "text" else self.tower_of(name).width

    def with_options(self, **changes: Any) -> UnifiedModel:
        own = tuple((name, replace(each, **changes)) for name, each in self.own_towers)
        tower = replace(self.tower, **changes)
        return super().with_options(**changes).clone(tower=tower, own_towers=own)

    @property
    def stacks(self) -> dict[str, TransformerOptions]:
        towers = {f"towers_{name}": self.tower_of(name) for name in self.context_names}
        return super().stacks | towers

    def look(self, name: str, batch: Batch, *, deterministic: bool = True) -> Tokens:
        """Returns the features of a context modality's items (images, clips), one item a row.

        A batch may hold them as `looked` [rows, N, D], with `looked_valid` [rows, N]: they were
        computed before (`training.features`).

        Raises:
          ValueError: pictures of one document would share the room of experts.
        """
        group = self.tower_of(name).own("group", 1)
        if group > 1 and batch[name]["present"].ndim == 2 and not deterministic:
            raise ValueError(
                f"feed_forward_options.group={group} of the tower of {name}: pictures of one "
                "document would share an expert's room, and texts depend on later ones: set it to 1"
            )
        items = fold_items(batch[name])
        if "looked" in items:
            x, valid = items["looked"].astype(self.options.dtype), items["looked_valid"]
            return Tokens(x, single_document(valid, Group(name, name, x.shape[1])))
        tokens = self.embed_items(name, batch[name])
        plan = plan_attention(self.tower_of(name), ALONE, tokens.metadata, tokens.metadata)
        x, _ = self.towers[name](tokens.embeddings, plan, deterministic=deterministic)
        return Tokens(x, tokens.metadata)

    def look_at_all(self, batch: Batch, *, deterministic: bool = True) -> dict[str, Tokens]:
        """Returns the features of every context modality."""
        return {
            name: self.look(name, batch, deterministic=deterministic) for name in self.context_names
        }

    def memory(self, looked: Mapping[str, Tokens], batch: Batch) -> Memory | None:
        """Returns what the text attends to of the features; None where it attends to none."""
        return None

    def read(
        self, tokens: Tokens, memory: Memory | None, views: Sequence[View], **more: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs the main transformer over texts: embeddings, and keys and values to keep."""
        raise NotImplementedError

    def encode(
        self, batch: Batch, views: Sequence[View], *, deterministic: bool = True
    ) -> dict[str, Encoded]:
        looked = self.look_at_all(batch, deterministic=deterministic)
        read = [view for view in views if view.with_text]
        texts = self.read_texts(batch, looked, read, deterministic) if read else {}
        return {view.name: _encoded(texts.get(view.name), looked, batch, view) for view in views}

    def read_texts(
        self,
        batch: Batch,
        looked: Mapping[str, Tokens],
        views: Sequence[View],
        deterministic: bool,
    ) -> dict[str, Float[Array, "B T D"]]:
        """Returns the text's embeddings in each view, by its name.

        A batch may hold them as `read` [B, T, D], of one view, where they depend on no context:
        they were computed before (`training.features`).
        """
        if "read" in batch["text"]:
            (view,) = views
            return {view.name: batch["text"]["read"].astype(self.options.dtype)}
        memory = self.memory(looked, batch)
        after = memory.length if memory else 0
        tokens = concatenate([self.embed_text(batch["text"], view.name, after) for view in views])
        x, _ = self.read(tokens, memory, views, deterministic=deterministic)
        return {name: x[:, span] for name, span in spans(tokens.metadata.groups).items()}

    def read_context(self, batch: Batch, view: View) -> Encoded:
        return _encoded(None, self.look_at_all(batch), batch, view)


def _encoded(text: Array | None, looked: Mapping[str, Tokens], batch: Batch, view: View) -> Encoded:
    context = {
        name: unfold_items(features.embeddings, features.metadata, batch[name], 0)
        for name, features in looked.items()
    }
    outputs = {name: tokens.embeddings for name, tokens in context.items()}
    valid = {name: tokens.metadata.valid for name, tokens in context.items()}
    return Encoded(outputs | ({} if text is None else {"text": text}), valid, None, view.resolved)


class LateFusion(WithTowers):
    """Two or more towers (Radford et al. 2021): no token of one modality sees another's."""

    abilities: ClassVar[frozenset[str]] = frozenset({"contrastive"})

    def read_text(
        self, text: Mapping[str, Array], view: View, *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        tokens = self.embed_text(text, view.name)
        return self.read(tokens, None, (view,), deterministic=deterministic)[0]

    def read(
        self, tokens: Tokens, memory: Memory | None, views: Sequence[View], **more: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        table = MaskTable(tuple(views))
        plan = plan_attention(self.options, table, tokens.metadata, tokens.metadata)
        return self.transformer(tokens.embeddings, plan, **more)
