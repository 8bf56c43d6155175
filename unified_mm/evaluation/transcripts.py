"""Scores of transcripts: the word and the character error rate, and silence that stays empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from unified_mm.data.negatives import kind_of
from unified_mm.data.records import Record
from unified_mm.data.sounds import library
from unified_mm.objectives.transcription import NORMALISERS


def transcript_scores(
    heard: Sequence[str], references: Sequence[str], normaliser: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the error rates of a corpus, and those of its most frequent transcript for all.

    Args:
      heard: what a model wrote.
      references: the transcripts.
      normaliser: of both, by its name.

    Returns:
      `wer` and `cer`, edits by the length of the references, and `accuracy`, the share of texts
      without one; then the same of the control.

    Raises:
      ValueError: nothing is left of all references, or the extra 'audio' is not installed.
    """
    normalise = NORMALISERS[normaliser]
    wanted = [normalise(text) for text in references]
    if not any(wanted):
        raise ValueError(f"no transcript has a word by the normaliser {normaliser!r}")
    usual = min(Counter(wanted).items(), key=lambda each: (-each[1], each[0]))[0]
    return (
        _rates(list(map(normalise, heard)), wanted),
        _rates([usual] * len(wanted), wanted),
    )


def _rates(heard: list[str], wanted: list[str]) -> dict[str, float]:
    jiwer = library("jiwer")
    return {
        "wer": float(jiwer.wer(wanted, heard)),
        "cer": float(jiwer.cer(wanted, heard)),
        "accuracy": fmean(map(str.__eq__, wanted, heard)),
    }


def empty_shares(negatives: Sequence[Record], heard: Sequence[str]) -> dict[str, float]:
    """Returns how often nothing was written about each kind of negative example."""
    kinds = sorted({kind_of(record) for record in negatives})
    return {
        f"empty_on_{kind}": fmean(
            not text
            for record, text in zip(negatives, heard, strict=True)
            if kind_of(record) == kind
        )
        for kind in kinds
    }
