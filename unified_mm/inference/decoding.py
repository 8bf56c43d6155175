"""How text is chosen from a model's scores: what a user asks for, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from unified_mm.data.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Decoding:
    """Greedy by default.

    Attributes:
      tokens: the most that are written, the end among them; None as many as the model reads.
      temperature: what scores are divided by before a token is drawn; 0 takes the likeliest.
      top_k: of how many likeliest tokens one is drawn (Fan et al. 2018); 0 of all.
      top_p: the share of probability that the likeliest tokens, of which one is drawn, must reach
        together (Holtzman et al. 2020, "nucleus"), after `top_k`.
      beams: of beam search; 1 has none.
      length_penalty: beams are compared by log-likelihood / length ** length_penalty; 0 favours
        short texts, 1 takes the mean of a token (Wu et al. 2016, section 7, without its offset).
      samples: texts for each prompt: drawn, or the best beams.
      stop: tokens that end a text as its end does, and are not part of it: as they are spelt, or
        their ids.
      seed: of what is drawn.

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
        for name in ("beams", "samples"):
            _at_least(name, getattr(self, name), 1)
        for name in ("temperature", "top_k", "length_penalty"):
            _at_least(name, getattr(self, name), 0)
        if self.tokens is not None:
            _at_least("tokens", self.tokens, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must be from 0 to {2**32 - 1}")
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
        """The tokens that end a text, its own end first.

        Raises:
          ValueError: no token of this tokenizer.
        """
        found = [tokenizer.eos_id]
        for stop in self.stop:
            found += _ids_of(stop, tokenizer)
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Attributes:
      text: without its end.
      tokens: their ids, the end included where there is one.
      log_likelihood: of these tokens, in nats, by the model's own scores, however they were drawn.
    """

    text: str
    tokens: tuple[int, ...]
    log_likelihood: float

    @classmethod
    def of_row(
        cls,
        row: Int[np.ndarray, " W"],
        log_likelihood: float,
        ends: Sequence[int],
        tokenizer: TextTokenizer,
    ) -> Written:
        """A padded row of what was written; `ends` are the tokens that end a text."""
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


def _at_least(name: str, value: int | float, least: int) -> None:
    if not value >= least:  # so that NaN is refused too
        raise ValueError(f"{name}={value}: must be at least {least}")


GREEDY = Decoding()
