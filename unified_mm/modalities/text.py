"""Text: byte-level BPE tokens, learned positions, and the head that predicts the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unified_mm.config import build_options, option
from unified_mm.data.records import Record
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.nn.layers import Norm, partitioned
from unified_mm.nn.quantized import Quantized
from unified_mm.nn.tokens import Group, Tokens, single_document

VOCABULARY_MULTIPLE = 64
# Arrays of a text -> the same of its tokens as the reader of a contrast knows them.
READER_KEYS = {"ids": "reader_ids", "valid": "reader_valid"}


@dataclass(frozen=True)
class TextModality:
    """Texts of at most `length` tokens; one text of each record is drawn.

    Attributes:
      name: its key under `config.model.modalities`.
      question_share: probability of drawing a question with its answer rather than a caption, where
        a record has both.
      tokenizer: of the run.
      reader: prepares the texts for `model.reader` too; None if there is none.
      embedding: options of the embedder.
      length: T.
      attend_padding: whether padding counts as text: it is attended to and pooled, but not scored.
    """

    name: str
    question_share: float
    tokenizer: TextTokenizer
    embedding: TextEmbedding
    reader: TextModality | None = None
    length: int = option(32, least=3)  # begin, word and end
    attend_padding: bool = False

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> TextModality:
        where = f"model.modalities.{name}"
        known = resources.tokenizer.vocabulary_size
        used = options["vocabulary"] or known
        if used < known:
            raise ValueError(f"{where}.vocabulary={used}: the tokenizer has {known} tokens")
        positions = options["max_positions"] or options["length"]
        built: TextModality = build_options(
            cls,
            options,
            where,
            name=name,
            question_share=float(resources.data.question_share),
            tokenizer=resources.tokenizer,
            reader=getattr(resources, "reader", None),
            embedding=build_options(
                TextEmbedding, options, where, used=used, max_positions=positions
            ),
        )
        return built

    @property
    def vocabulary(self) -> int:
        """V, the number of token embeddings."""
        return self.embedding.vocabulary

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        """Returns the arrays of one text of the record: drawn by `rng`, else the first."""
        if not record.texts:
            return self.absent()
        return self.prepare_view(record, 0 if rng is None else self.draw_view(record, rng))

    def count_views(self, record: Record) -> int:
        """Returns how many texts of the record may be drawn."""
        return len(record.texts)

    def draw_view(self, record: Record, rng: np.random.Generator) -> int:
        """Returns the number of the text of the record that is drawn."""
        numbers = range(len(record.texts))
        captions = [number for number in numbers if not record.texts[number].prompt]
        questions = [number for number in numbers if record.texts[number].prompt]
        drawn = captions or questions
        if captions and questions and rng.random() < self.question_share:
            drawn = questions
        return drawn[int(rng.integers(len(drawn)))]

    def prepare_view(self, record: Record, number: int) -> dict[str, np.ndarray]:
        """Returns the arrays of one text of the record."""
        text = record.texts[number]
        return self.encode(text.prompt, text.target)

    def encode(self, prompt: str, target: str) -> dict[str, np.ndarray]:
        """Returns `ids` int32 [T], `valid`, `scored` bool [T], `prompted`, `present` bool []."""
        arrays = self.tokenizer.encode(prompt, target, self.length)
        if self.attend_padding:
            arrays["valid"] = np.ones(self.length, bool)
        arrays |= {"prompted": np.array(bool(prompt)), "present": np.array(True)}
        return arrays | ({} if self.reader is None else for_reader(self.reader.encode("", target)))

    def absent(self) -> dict[str, np.ndarray]:
        arrays = {
            "ids": np.zeros(self.length, np.int32),
            "valid": np.zeros(self.length, bool),
            "scored": np.zeros(self.length, bool),
            "prompted": np.array(False),
            "present": np.array(False),
        }
        return arrays | ({} if self.reader is None else for_reader(self.reader.absent()))

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        return TextEmbedder(self.name, self.embedding, width, dtype)


def for_reader(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of a text that a reader reads, under its keys."""
    return {name: arrays[key] for key, name in READER_KEYS.items()}


@dataclass(frozen=True)
class TextEmbedding:
    """The options of `TextEmbedder`.

    Attributes:
      used: how many token ids are in use: those of the tokenizer, or more.
      max_positions: how many positions have a learned embedding.
      learned_positions: whether positions are learned (rotary positions need none).
      modality_embedding: whether a learned embedding of the modality is added.
      scaled: whether token embeddings are multiplied by sqrt(D) (Vaswani et al. 2017, 3.4).
      norm: whether a layer norm follows the sum (BERT).
      norm_epsilon: of that norm.
      head: 'tied', logits from the table of token embeddings, or 'own', from a table of their own.
    """

    used: int
    max_positions: int
    learned_positions: bool = True
    modality_embedding: bool = True
    scaled: bool = True
    norm: bool = False
    norm_epsilon: float = 1e-6
    head: str = option("tied", choices=("tied", "own"))

    @cached_property
    def vocabulary(self) -> int:
        """V: `used`, rounded up to a multiple of `VOCABULARY_MULTIPLE` that meshes can divide."""
        return -(-self.used // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@jax.custom_vjp
def scores(x: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Returns the products of tokens with all rows of a table, added up in float32.

    The products of the gradient are of the type of x: jax would compute them in float32.
    """
    return jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)


def _scores_forward(x: Array, table: Array) -> tuple[Array, Any]:
    return scores(x, table), (x, table)


def _scores_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, table = kept
    narrow = cotangent.astype(x.dtype)
    return jnp.einsum("BTV,VD->BTD", narrow, table), jnp.einsum("BTV,BTD->VD", narrow, x)


scores.defvjp(_scores_forward, _scores_backward)


class TextEmbedder(nn.Module):
    """Token, 1D position and modality embeddings, and logits, by default from the same table."""

    name_of_group: str
    embedding: TextEmbedding
    width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        e = self.embedding
        small = nn.initializers.normal(self.width**-0.5)
        table = partitioned(small, "vocabulary", "embed")
        self.table = self.param("tokens", table, (e.vocabulary, self.width))
        if e.head == "own":
            self.scores = self.param("scores", table, (e.vocabulary, self.width))
        if e.learned_positions:
            self.positions = self.param(
                "positions",
                partitioned(nn.initializers.normal(0.1), None, "embed"),
                (e.max_positions, self.width),
            )
        if e.modality_embedding:
            self.modality = self.param(
                "modality", partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
            )
        if e.norm:
            self.norm = Norm("layer", e.norm_epsilon, self.dtype)

    def __call__(self, batch: Mapping[str, Array]) -> Tokens:
        """Embeds `ids` and `valid` [B, T], `present` [B].

        `text_position` [B, T], if given, selects the position embedding of each token; where there
        is none for it, the token becomes NaN, and so does the loss.

        Raises:
          ValueError: more tokens than positions that are learned.
        """
        e = self.embedding
        valid = batch["valid"] & batch["present"][:, None]
        ids = jnp.where(valid, batch["ids"], 0)
        # Whole rows are looked up: were their width still divided, as the table is, the
        # gradient of every token would have to be gathered on every device.
        x = nn.with_logical_constraint(self.table, ("vocabulary", None))[ids]
        if e.scaled:
            # Unit variance in, like the patches; the table itself is small, for the tied head.
            x = x * self.width**0.5
        if e.learned_positions:
            x = x + self._positions(batch.get("text_position"), ids.shape[1])
        if e.modality_embedding:
            x = x + self.modality
        if e.norm:
            x = self.norm(x)
        x = jnp.where(valid[..., None], x, 0).astype(self.dtype)
        group = Group(self.name_of_group, self.name_of_group, ids.shape[1], valid_first=True)
        return Tokens(x, single_document(valid, group))

    def _positions(self, places: Array | None, length: int) -> Float[Array, "..."]:
        """Returns the position embeddings at places [B, T], or of the first `length`.

        jax would take the last embedding for every place beyond it.
        """
        if places is not None:
            return self.positions.at[places].get(mode="fill", fill_value=jnp.nan)
        learned = self.embedding.max_positions
        if length > learned:
            field = f"model.modalities.{self.name_of_group}"
            raise ValueError(
                f"texts of {length} tokens ({field}.length), but the model learns {learned} "
                f"positions ({field}.max_positions): set the length to at most {learned}"
            )
        return self.positions[jnp.arange(length)]

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of the next token, -1e9 for unused ids."""
        e = self.embedding
        table = self.scores if e.head == "own" else self.table
        if isinstance(table, Quantized):
            logits = table.product(x, (1,))
        else:
            logits = scores(x, table.astype(x.dtype))
        if e.used == e.vocabulary:
            return logits
        return jnp.where(jnp.arange(e.vocabulary) < e.used, logits, -1e9)
