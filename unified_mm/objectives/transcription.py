"""Transcription: a modality's tokens become a text by connectionist temporal classification.

Graves et al. 2006. Each step in time says a unit or the blank; repeated units, then blanks, fall
out. No text is read, so that every fusion serves it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from unified_mm.config import option
from unified_mm.data.pipeline import Arrays
from unified_mm.data.records import Record
from unified_mm.data.sounds import SoundError
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import View
from unified_mm.nn.layers import Dense
from unified_mm.objectives.objective import (
    ObjectiveOutput,
    StepContext,
    TextObjective,
    masked_metric,
    same_rank,
)

BLANK = 0
# Keys of a batch: int32 [B, T], the units of a transcript from 1 on, then 0; whether there is one.
UNITS, TRANSCRIBED = "units", "transcribed"


def plain(text: str) -> str:
    """Returns a text in lower case, without punctuation but apostrophes, in single spaces."""
    kept = (
        each if each == "'" or unicodedata.category(each)[0] in "LMN" else " "
        for each in unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    )
    return " ".join("".join(kept).split())


def exact(text: str) -> str:
    """Returns a text as it is, in single spaces."""
    return " ".join(text.split())


NORMALISERS: dict[str, Callable[[str], str]] = {"plain": plain, "exact": exact}
# How a text becomes units, and what joins them.
SPLITS: dict[str, tuple[Callable[[str], list[str]], str]] = {
    "characters": (list, ""),
    "words": (str.split, " "),
}


def transcript_of(record: Record) -> str | None:
    """Returns the transcript of a record, its first text without a prompt; None for none."""
    return next((text.target for text in record.texts if not text.prompt), None)


@dataclass(frozen=True)
class Transcription(TextObjective):
    """The negative log-likelihood of transcripts in nats per unit and end, over all alignments.

    Attributes:
      of: the modality that is transcribed.
      units: what a step in time says: 'characters', or 'words' where there are few.
      normaliser: of the transcripts, which are learned and scored so: 'plain' (lower case, no
        punctuation) or 'exact'.
      alphabet: the units; () takes those of the training data, in order, and the run keeps them.
      longest: units of the longest transcript, taken with it.
      slots: units that a step in time may say.
    """

    weight: float = 0.0
    rule: str = "separate"
    of: str = "audio"
    units: str = option("characters", choices=tuple(SPLITS))
    normaliser: str = option("plain", choices=tuple(NORMALISERS))
    alphabet: tuple[str, ...] = ()
    longest: int = option(0, least=0)
    slots: int = option(1, least=1)

    from_data: ClassVar[tuple[str, ...]] = ("alphabet", "longest")

    @cached_property
    def view(self) -> View:
        return View(self.name, self.rule, with_text=False)

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return (self.of,)

    def head(self) -> nn.Module | None:
        if not self.alphabet:
            raise ValueError(
                f"objectives.{self.name}.alphabet is empty: the command takes it from the "
                "training data; elsewhere, give its units, and `longest`"
            )
        return UnitHead(len(self.alphabet) + 1, self.slots)

    def split(self, text: str) -> list[str]:
        """Returns the units of a text."""
        return SPLITS[self.units][0](NORMALISERS[self.normaliser](text))

    def measure(self, records: Sequence[Record]) -> dict[str, Any]:
        """Returns the units of the transcripts of records, and the number of the longest one's.

        Raises:
          ValueError: there is none.
        """
        found = [self.split(transcript_of(record) or "") for record in records]
        alphabet = sorted(set().union(*found))
        if not alphabet:
            raise ValueError(f"objectives.{self.name}: no training example has a transcript")
        return {"alphabet": tuple(alphabet), "longest": max(map(len, found))}

    def targets(self, record: Record) -> Arrays:
        """Returns the units of a record's transcript, by their keys in a batch.

        Raises:
          ValueError: there are more than `longest`, or one that is not in the alphabet.
        """
        text = transcript_of(record)
        units = self.split(text or "")
        strange = sorted(set(units) - set(self._numbers))
        if strange or len(units) > self.longest:
            fault = f"the unit {strange[0]!r}" if strange else f"{len(units)} units"
            raise ValueError(
                f"the transcript of example {record.id!r} has {fault}: objectives.{self.name} has "
                f"an alphabet of {len(self.alphabet)} units, and at most {self.longest} a text"
            )
        found = np.zeros(self.longest, np.int32)
        found[: len(units)] = [self._numbers[unit] for unit in units]
        return {UNITS: found, TRANSCRIBED: np.array(text is not None)}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {unit: number for number, unit in enumerate(self.alphabet, 1)}

    def text(self, units: Int[np.ndarray, " S"]) -> str:
        """Returns the text of units as `greedy` gives them."""
        joined = SPLITS[self.units][1].join(self.alphabet[unit - 1] for unit in units if unit)
        return exact(joined)

    def too_short(self, modality: Any, records: Sequence[Record]) -> list[Record]:
        """Returns the records that have fewer steps in time than their transcript needs.

        Those that cannot be read are not among them.
        """
        found = []
        for record in records:
            if self.of in record.parts and (text := transcript_of(record)):
                numbers = np.array([self._numbers.get(unit, 0) for unit in self.split(text)])
                try:
                    steps = modality.steps_of(record.parts[self.of])
                except SoundError:
                    continue
                if self.slots * steps < _needed(numbers):
                    found.append(record)
        return found

    def preparer(self, modality: Any, records: Sequence[Record]) -> Transcribed:
        """Returns what prepares the modality's arrays with the transcripts beside them.

        Raises:
          ValueError: the modality is heard in parts, of which the transcripts are not.
        """
        if not getattr(modality, "whole", True):
            where = f"model.modalities.{self.of}"
            raise ValueError(
                f"objectives.{self.name} needs {where}.longer='leave_out' and {where}.roll=False: "
                "a transcript is of a whole sound, from its beginning"
            )
        return Transcribed(self, modality)

    def logits(
        self, model: UnifiedModel, seen: Encoded
    ) -> tuple[Float[Array, "B S C"], Bool[Array, "B S"]]:
        """Returns the scores of the blank and of each unit, and which steps there are."""
        together = getattr(model.modalities[self.of], "tokens_per_step", 1)
        # Tokens that are of no moment come before those that are.
        first = getattr(model.modalities[self.of], "class_tokens", 0)
        x, valid = seen.outputs[self.of][:, first:], seen.valid[self.of][:, first:]
        x = x.reshape(x.shape[0], -1, together * x.shape[2])
        valid = valid.reshape(x.shape[0], -1, together).any(-1)
        return model.head[self.name](x), jnp.repeat(valid, self.slots, axis=1)

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        own = batch[self.of]
        logits, valid = self.logits(model, encoded[self.name])
        return transcription_loss(logits, valid, own[UNITS], own[TRANSCRIBED] & own["present"])

    def written(self, model: UnifiedModel, batch: Batch) -> Int[Array, "B S"]:
        """Returns the units that the model writes about each example, as `greedy` does."""
        return greedy(*self.logits(model, model.read_context(batch, self.view)))


@same_rank
def transcription_loss(
    logits: Float[Array, "B S C"],
    valid: Bool[Array, "B S"],
    units: Int[Array, "B T"],
    counts: Bool[Array, " B"],
) -> ObjectiveOutput:
    """Returns the loss of the examples that count and are long enough for their transcript.

    Args:
      logits: of the blank and of each unit.
      valid: which steps there are, the first ones.
      units: of each transcript, from 1 on, then 0.
      counts: which examples have sound and transcript.
    """
    fits = valid.sum(1) >= _needed(units)
    nats = optax.ctc_loss(
        jnp.where(valid[..., None], logits, 0.0),
        (~valid).astype(jnp.float32),
        units,
        (units == BLANK).astype(jnp.float32),
        blank_id=BLANK,
    )
    total, scored = masked_metric(nats, counts & fits)
    lengths, _ = masked_metric((units != BLANK).sum(1).astype(jnp.float32), counts & fits)
    short = masked_metric((~fits).astype(jnp.float32), counts)
    return ObjectiveOutput((total, lengths + scored), {"too_short": short}, {})


def _needed(units: Any) -> Any:
    """Returns the steps that an alignment needs: one a unit, and a blank within each double."""
    doubles = (units[..., 1:] == units[..., :-1]) & (units[..., 1:] != BLANK)
    return (units != BLANK).sum(-1) + doubles.sum(-1)


def greedy(logits: Float[Array, "B S C"], valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns the units of the likeliest alignment, from 1 on, then 0.

    Steps that are not valid say nothing, whatever they hold.
    """
    best = jnp.where(valid, logits.argmax(-1), BLANK)
    before = jnp.pad(best[:, :-1], ((0, 0), (1, 0)))
    said = (best != BLANK) & (best != before)
    rows, steps = best.shape
    place = jnp.where(said, said.cumsum(1) - 1, steps)  # beyond the end: dropped
    return jnp.zeros_like(best).at[jnp.arange(rows)[:, None], place].set(best, mode="drop")


class UnitHead(nn.Module):
    """The head of a transcription: a dense map from each step in time to float32 logits."""

    units: int
    slots: int

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S C"]:
        x = x.astype(jnp.float32)
        y = Dense((self.slots * self.units,), ("embed",), (None,), name="score")(x)
        return y.reshape(y.shape[0], -1, self.units)


@dataclass(frozen=True)
class Transcribed:
    """The preparer of a modality that adds the units of each example's transcript.

    Attributes:
      objective: has the alphabet.
      modality: prepares all else.
    """

    objective: Transcription
    modality: Any

    def prepare(self, record: Record, rng: np.random.Generator | None) -> Arrays:
        return self.modality.prepare(record, rng) | self.objective.targets(record)

    def absent(self) -> Arrays:
        none = np.zeros(self.objective.longest, np.int32)
        return self.modality.absent() | {UNITS: none, TRANSCRIBED: np.array(False)}
