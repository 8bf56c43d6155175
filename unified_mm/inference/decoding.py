"""Options of decoding, which choose text by a model's logits, and the text that is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from unified_mm.data.text_tokenizer import TextTokenizer

LARGEST = 2**31 - 1
MOST_TEXTS = 1024  # of one prompt at once; each has a row of the cache
HOTTEST = 1000


@dataclass(frozen=True)
class Decoding:
    """Options of decoding, checked; greedy by default.

    Attributes:
      tokens: the most that are written, the end included; None for as many as the model reads.
      temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
      top_k: how many of the likeliest tokens are drawn from (Fan et al. 2018); 0 for all.
      top_p: the probability that the tokens drawn from, likeliest first, reach together
        (Holtzman et al. 2020, nucleus sampling); applied after `top_k`.
      beams: beams of beam search; 1 for no beam search.
      length_penalty: beams are compared by log-likelihood / length ** length_penalty; 0 favours
        short texts, 1 takes the mean of a token (Wu et al. 2016, section 7, without its offset).
      samples: texts for each prompt: drawn, or the best beams.
      stop: tokens, or their ids, that end a text as its end token does and are not part of it.
      seed: seed of the draws.

    Raises:
      ValueError: a value out of its range, or two that exclude each other.
    """

    tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    samples: int = 1
    stop: tuple[str | int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("tokens", 1, LARGEST),
            ("top_k", 0, LARGEST),
            ("beams", 1, MOST_TEXTS),
            ("samples", 1, MOST_TEXTS),
            ("seed", 0, 2**32 - 1),
        ):
            _check_whole(name, getattr(self, name), least, most)
        for name in ("temperature", "length_penalty"):
            _check_number(name, getattr(self, name))
        _check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r}: give a tuple of tokens, not a text alone")
        if self.beams == 1 and self.length_penalty != 1:
            raise ValueError("length_penalty compares beams: give more than one of them")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(
                f"beams={self.beams} with temperature={self.temperature}: beam search draws "
                "nothing; give one of them"
            )
        if self.beams > 1 and self.samples > self.beams:
            raise ValueError(
                f"samples={self.samples} of beams={self.beams}: there are no more texts than beams"
            )
        if self.beams == 1 and self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} with temperature=0 would all be the same: give a "
                "temperature, or beams"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p are of what is drawn: give a temperature above 0")

    def stop_ids(self, tokenizer: TextTokenizer) -> tuple[int, ...]:
        """Returns the ids of the tokens that end a text, its end token first.

        Raises:
          ValueError: a stop is no single token of this tokenizer.
        """
        found = [tokenizer.eos_id]
        for stop in self.stop:
            found += _ids_of(stop, tokenizer)
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Attributes:
      text: the text, without its end token.
      tokens: its token ids, the end token included where there is one.
      log_likelihood: of all these tokens, in nats, by the model's own logits, however they were
        drawn.
    """

    text: str
    tokens: tuple[int, ...]
    log_likelihood: float

    @classmethod
    def of_row(
        cls,
        row: Int[np.ndarray, " S"],
        log_likelihood: float,
        ends: Sequence[int],
        tokenizer: TextTokenizer,
    ) -> Written:
        """Builds the text of a padded row of tokens.

        Args:
          row: token ids, padded, no longer than the text might be.
          log_likelihood: as in the class.
          ends: the tokens that end a text.
          tokenizer: decodes the tokens.
        """
        ended = np.flatnonzero(np.isin(row, ends))[:1]
        # Without an end it is full, and what follows it is padding.
        filled = ended if len(ended) else np.flatnonzero(row != tokenizer.pad_id)[-1:]
        length = int(filled.sum()) + len(filled)
        stop = length - len(ended)
        return cls(tokenizer.decode(row[:stop]), tuple(row[:length].tolist()), log_likelihood)


def _ids_of(stop: str | int, tokenizer: TextTokenizer) -> Sequence[int]:
    if isinstance(stop, int):
        if not 0 <= stop < tokenizer.vocabulary_size:
            raise ValueError(f"stop={stop}: the tokenizer has {tokenizer.vocabulary_size} tokens")
        return [stop]
    found = tokenizer.spellings(stop)
    if not found:
        raise ValueError(f"stop={stop!r} is no single token of this model's tokenizer")
    return found


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if value is None and name == "tokens":
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value!r}: must be a whole number")
    if not least <= value <= most:
        raise ValueError(f"{name}={value}: must be at least {least} and at most {most}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise ValueError(f"{name}={value!r}: must be a number")
    if not 0 <= value <= HOTTEST:  # so that NaN is refused too
        raise ValueError(f"{name}={value}: must be at least 0 and at most {HOTTEST}")


GREEDY = Decoding()
