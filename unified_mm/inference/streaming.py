"""Streaming of one text: a step on the device for each token, its state donated to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.inference.decoding import GREEDY, Decoding
from unified_mm.inference.generate import TextWriter
from unified_mm.inference.predictor import Batch, Predictor, inputs_of


def stream(
    predictor: Predictor, batch: Batch, prompt: str, decoding: Decoding = GREEDY
) -> Iterator[str]:
    """Returns an iterator over the text of a batch of one example, in pieces.

    Joined, the pieces are the text that `generate` writes.

    Raises:
      ValueError: a prompt that leaves no room, beams, or more samples than one.
    """
    if decoding.beams > 1 or decoding.samples > 1:
        raise ValueError("one text can be streamed: give neither beams nor samples")
    (alone,) = predictor.without_pictures(batch, [prompt], decoding)
    if alone is not None:
        return iter([alone.text])
    tokenizer = predictor.task.tokenizer
    length = predictor.task.modalities["text"].length
    text, used = predictor.prompts([prompt])
    ends = decoding.stop_ids(tokenizer)
    threshold = predictor.thresholds([prompt], decoding)
    inputs = inputs_of(decoding, {**batch, "text": text}, length - used, ends, 0, threshold)
    return _pieces(
        predictor,
        predictor.writer(length - 1),
        predictor.to_device(inputs),
        Spelling(tokenizer, ends),
    )


def _pieces(
    predictor: Predictor, writer: TextWriter, inputs: Any, spelling: Spelling
) -> Iterator[str]:
    state = predictor.call("stream", writer.begin, inputs)
    while True:
        done = bool(state.done[0])
        piece = spelling.add(int(state.token[0]), last=done)
        if piece:
            yield piece
        if done:
            return
        state = predictor.call("stream on", writer.decode_step, state, donated=(1,))


class Spelling:
    """An incremental detokenizer: joined, its pieces are what all tokens together decode to.

    A token may be only part of a character, and a trailing space is dropped until more follows.
    """

    def __init__(self, tokenizer: TextTokenizer, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._tokens: list[int] = []
        self._said = ""

    @property
    def text(self) -> str:
        """The text of all pieces so far."""
        return self._said

    def add(self, token: int, *, last: bool) -> str:
        """Adds a token and returns the text that it completes; with the last one, all the rest."""
        if token not in self._ends:
            self._tokens.append(token)
        whole = self._tokenizer.decode(self._tokens)
        if not last:
            whole = whole.rstrip("\N{REPLACEMENT CHARACTER}")
        if not whole.startswith(self._said):
            return ""
        piece, self._said = whole[len(self._said) :], whole
        return piece
