"""Text: byte-level BPE tokens, learned positions, and the head that predicts the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unified_mm.data.records import Record, Text
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.modalities.tokens import Group, Tokens, single_document
from unified_mm.parallel.layers import partitioned

VOCABULARY_MULTIPLE = 64


class Hashable:
    """A tokenizer held by a frozen dataclass: equal only to itself, for jit's static arguments."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer


@dataclass(frozen=True)
class TextModality:
    """Texts of at most `length` tokens; one text a record is drawn.

    `vocabulary` is the number of token embeddings: the tokenizer's, padded for even division.

    `question_share` says how often that is a question with its answer, where a record has both.
    """

    name: str
    length: int
    vocabulary: int
    question_share: float
    encoder: Hashable

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> TextModality:
        tokenizer = resources.tokenizer
        return cls(
            name=name,
            length=int(options["length"]),
            vocabulary=padded(tokenizer.vocabulary_size),
            question_share=float(resources.data.question_share),
            encoder=Hashable(tokenizer),
        )

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """One text of the record, drawn by `rng`; the first one where there is no `rng`."""
        if not record.texts:
            return self.absent()
        if rng is None:
            text = record.texts[0]
        else:
            text = self._draw(record.texts, rng)
        return self.encode(text.prompt, text.target)

    def _draw(self, texts: Sequence[Text], rng: np.random.Generator) -> Text:
        captions = [text for text in texts if not text.prompt]
        questions = [text for text in texts if text.prompt]
        if captions and questions:
            texts = questions if rng.random() < self.question_share else captions
        return texts[int(rng.integers(len(texts)))]

    def encode(self, prompt: str, target: str) -> dict[str, np.ndarray]:
        """`ids` int32 [T], `valid` and `scored` bool [T], `prompted` and `present` bool []."""
        arrays = self.encoder.tokenizer.encode(prompt, target, self.length)
        return {**arrays, "prompted": np.array(bool(prompt)), "present": np.array(True)}

    def absent(self) -> dict[str, np.ndarray]:
        return {
            "ids": np.zeros(self.length, np.int32),
            "valid": np.zeros(self.length, bool),
            "scored": np.zeros(self.length, bool),
            "prompted": np.array(False),
            "present": np.array(False),
        }

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        return TextEmbedder(self.name, self.vocabulary, self.length, width, dtype)


def padded(vocabulary: int) -> int:
    """A size that meshes divide: how many tokens a tokenizer ends up with is nobody's choice."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class TextEmbedder(nn.Module):
    """Token, 1D position and modality embeddings; the same table scores the next token."""

    name_of_group: str
    vocabulary: int
    length: int
    width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.table = self.param(
            "tokens",
            partitioned(nn.initializers.normal(self.width**-0.5), "vocabulary", "embed"),
            (self.vocabulary, self.width),
        )
        self.positions = self.param(
            "positions",
            partitioned(nn.initializers.normal(0.1), None, "embed"),
            (self.length, self.width),
        )
        self.modality = self.param(
            "modality", partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
        )

    def __call__(self, batch: Mapping[str, Array], start: Array | int = 0) -> Tokens:
        """`ids` [B, T] and `valid` [B, T] -> Tokens; `start` [] is the first one's position."""
        valid = batch["valid"] & batch["present"][:, None]
        ids = jnp.where(valid, batch["ids"], 0)
        places = start + jnp.arange(ids.shape[1])
        # Whole rows are looked up: were their width still divided, as the table is kept, the
        # gradient of every token would have to be gathered on every device.
        table = nn.with_logical_constraint(self.table, ("vocabulary", None))
        # Unit variance in, like the patches; the table itself is small, for the tied head.
        x = table[ids] * self.width**0.5 + self.positions[places] + self.modality
        x = jnp.where(valid[..., None], x, 0).astype(self.dtype)
        group = Group(self.name_of_group, self.name_of_group, ids.shape[1])
        metadata = single_document(valid, group)
        return Tokens(x, metadata.replace(position=metadata.position + start))  # type: ignore[attr-defined]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of the next token, float32, by the tied table."""
        return jnp.einsum(
            "BTD,VD->BTV", x, self.table.astype(x.dtype), preferred_element_type=jnp.float32
        )
