"""A reader: the text model of another run, by which contrast reads its texts.

Zhai et al. 2022, "LiT: zero-shot transfer with locked-image text tuning", hold one side of a
contrast still and tune the other to it; here the still side is the text's. A model that writes
reads its texts from left to right and knows what its captions taught it; a reader may look both
ways, know words of its own, and have read a billion sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from unified_mm.config import read_options
from unified_mm.modalities.text import READER_KEYS, TextEmbedder, TextEmbedding, TextModality
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import OWN_OPTIONS, TransformerOptions, frozen
from unified_mm.nn.pooling import pooled
from unified_mm.nn.transformer import Transformer

# What it made of a text, where that was computed before (`training.features`).
SENTENCE = "sentence"
# Options of how a transformer is computed that are those of the main one: see `nn.options`.
SHARED = ("unstacked", "attention", "counted")


class Reader(nn.Module):
    """A text transformer with a pool; the names of its parameters are those of the run it is from.

    It computes in float32, and has no dropout.

    Attributes:
      options: the shape of the transformer.
      text: of the embedder.
      rule: by which it reads.
      pool: a pool without parameters.
    """

    options: TransformerOptions
    text: TextEmbedding
    rule: str
    pool: str

    @classmethod
    def from_config(cls, reader: Mapping[str, Any], modality: TextModality) -> Reader:
        """Returns the reader of `config.model.reader`, whose texts a modality prepares."""
        known = {
            name: reader[name] for name in TransformerOptions.config_fields() if name in reader
        }
        known |= frozen({name: known[name] for name in OWN_OPTIONS if name in known})
        options = TransformerOptions(**read_options(TransformerOptions, known, "model.reader"))
        return cls(options, modality.embedding, reader["rule"], reader["pool"])

    def with_options(self, **changes: Any) -> Reader:
        """Returns the reader with those of the main transformer's options that are for it, too."""
        own = {name: value for name, value in changes.items() if name in SHARED}
        return self.clone(options=replace(self.options, **own))

    def setup(self) -> None:
        self.embedders_text = TextEmbedder("text", self.text, self.options.width)
        self.transformer = Transformer(self.options)

    def __call__(
        self, text: Mapping[str, Array]
    ) -> tuple[Float[Array, "B 1 D"], Bool[Array, "B 1"]]:
        """Returns one vector of each text, and whether there is a text.

        Args:
          text: `reader_ids` and `reader_valid` [B, T], `present` [B]; or `SENTENCE` [B, 1, D] in
            their place.
        """
        present = text["present"][:, None]
        if SENTENCE in text:
            return text[SENTENCE], present
        own = {key: text[name] for key, name in READER_KEYS.items()} | {"present": text["present"]}
        tokens = self.embedders_text(own)
        table = MaskTable((View("text", self.rule),))
        plan = plan_attention(self.options, table, tokens.metadata, tokens.metadata)
        x, _ = self.transformer(tokens.embeddings, plan)
        return pooled(self.pool, x, tokens.metadata.valid)[:, None], present
