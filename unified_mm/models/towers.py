"""One transformer for each context modality, which sees nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unified_mm.modalities.tokens import Tokens
from unified_mm.models.attention import plan_attention
from unified_mm.models.backends import KERNELS
from unified_mm.models.masks import Stream, Visibility
from unified_mm.models.options import TransformerOptions
from unified_mm.models.transformer import Transformer
from unified_mm.models.unified import UnifiedModel

ALONE = Visibility((Stream("none", "separate"),))


class WithTowers(UnifiedModel):
    """What late and gated fusion share: each context modality goes through a tower of its own.

    Attributes:
      tower: shape of these towers.
    """

    tower: TransformerOptions

    @classmethod
    def from_config(cls, model: Any, modalities: Any, heads: Any, **more: Any) -> UnifiedModel:
        options = TransformerOptions.from_config(model)
        tower = options.changed(model.tower)
        return cls(modalities=modalities, options=options, heads=heads, tower=tower, **more)

    def setup(self) -> None:
        super().setup()
        self.towers = {name: Transformer(self.tower) for name in self.context_names}

    def width_of(self, name: str) -> int:
        return self.options.width if name == "text" else self.tower.width

    def with_options(self, **changes: Any) -> UnifiedModel:
        return super().with_options(**changes).clone(tower=replace(self.tower, **changes))

    def anywhere(self) -> UnifiedModel:
        kernel = KERNELS.keys() & {self.options.attention, self.tower.attention}
        return self.with_options(attention="auto") if kernel else self

    def look(self, name: str, batch: Any, *, deterministic: bool = True) -> Tokens:
        """Features of every picture of a context modality, each in a row of its own."""
        tokens = self.embed_apart(name, batch[name])
        plan = plan_attention(self.tower, ALONE, tokens.metadata, tokens.metadata)
        x, _ = self.towers[name](tokens.embeddings, plan, deterministic=deterministic)
        return Tokens(x, tokens.metadata)
