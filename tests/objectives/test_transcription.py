"""Transcription by CTC: the loss against all alignments, and what is written."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.data.records import Record, Text
from unified_mm.data.sounds import SoundError
from unified_mm.modalities.audio import AudioModality
from unified_mm.objectives.transcription import (
    BLANK,
    Transcription,
    exact,
    greedy,
    plain,
    transcription_loss,
)

DIGITS = Transcription("ctc", 1.0, "separate", alphabet=("a", "b"), longest=3)


def said(path):
    return [unit for unit, _ in itertools.groupby(path) if unit != BLANK]


def nats_of(logits, units):
    """The negative logarithm of the sum over all alignments."""
    logs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)), np.float64)
    paths = itertools.product(range(logits.shape[1]), repeat=len(logits))
    fitting = [path for path in paths if said(path) == units]
    return -np.log(sum(np.exp(sum(logs[np.arange(len(logs)), list(path)])) for path in fitting))


def test_the_loss_is_that_of_all_alignments():
    """Of steps that are there, of transcripts that fit: others are counted, and add nothing."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4, 3)).astype(np.float32)
    units = [[1, 2], [1, 1], [], [1, 1, 2], [2], [2]]
    steps, counts = [4, 3, 2, 3, 0, 4], np.array([True] * 5 + [False])
    rows = np.array([row + [0] * (3 - len(row)) for row in units], np.int32)
    valid = np.arange(4) < np.array(steps)[:, None]

    def loss(logits):
        found = transcription_loss(
            logits, jnp.asarray(valid), jnp.asarray(rows), jnp.asarray(counts)
        )
        return found.loss[0], found

    broken = np.where(valid[..., None], logits, np.nan)
    (total, found), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(broken))
    expected = sum(nats_of(logits[i, : steps[i]], units[i]) for i in range(3))
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert float(found.loss[1]) == (2 + 1) + (2 + 1) + 1  # units and ends
    assert tuple(map(float, found.metrics["too_short"])) == (2, 5)
    grad = np.asarray(grad)
    assert np.isfinite(grad).all() and not grad[3:].any() and not grad[~valid].any()
    assert np.abs(grad[:3][valid[:3]]).min() > 0


def test_what_is_written_is_the_best_path_without_repeats_and_blanks():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 9, 3)).astype(np.float32)
    steps = rng.integers(0, 10, 40)
    valid = np.arange(9) < steps[:, None]
    found = np.asarray(greedy(jnp.asarray(logits), jnp.asarray(valid)))
    for row, scores, count in zip(found, logits, steps, strict=True):
        want = said(scores[:count].argmax(1).tolist())
        assert row.tolist() == want + [0] * (9 - len(want))
    broken = np.where(valid[..., None], logits, np.nan)
    np.testing.assert_array_equal(greedy(jnp.asarray(broken), jnp.asarray(valid)), found)


def test_what_lowers_the_loss_writes_the_transcript():
    rows = jnp.array([[1, 1, 2], [2, 1, 0], [0, 0, 0]], jnp.int32)
    valid, counts = jnp.arange(8) < jnp.array([[8], [3], [5]]), jnp.ones(3, bool)

    def loss(logits):
        return transcription_loss(logits, valid, rows, counts).loss[0]

    def step(_, logits):
        return logits - jax.grad(loss)(logits)

    start = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8, 3)), jnp.float32)
    found = jax.jit(lambda logits: jax.lax.fori_loop(0, 60, step, logits))(start)
    np.testing.assert_array_equal(greedy(found, valid)[:, :3], rows)
    assert not np.asarray(greedy(found, valid))[:, 3:].any()


def record(text, id="x", **parts):
    return Record(id, parts, () if text is None else (Text("", text),), False)


def test_transcripts_become_units_and_back():
    records = [record("Ab!"), record("b  A"), record(""), record(None)]
    found = replace(DIGITS, **DIGITS.measure(records))
    assert found.alphabet == (" ", "a", "b") and found.longest == 3
    rows = [found.targets(each) for each in records]
    assert [row["units"].tolist() for row in rows] == [[2, 3, 0], [3, 1, 2], [0] * 3, [0] * 3]
    assert [bool(row["transcribed"]) for row in rows] == [True, True, True, False]
    assert found.text(rows[1]["units"]) == "b a" and found.text(rows[2]["units"]) == ""
    words = replace(DIGITS, units="words", alphabet=())
    words = replace(words, **words.measure(records))
    assert words.alphabet == ("a", "ab", "b")
    assert words.text(words.targets(records[1])["units"]) == "b a"
    for text, fault in (("abc", "the unit 'c'"), ("abab", "4 units")):
        with pytest.raises(ValueError, match=fault):
            DIGITS.targets(record(text))
    with pytest.raises(ValueError, match="no training example has a transcript"):
        DIGITS.measure([record("?"), record(None)])


def test_normalisers():
    assert plain("Don\u2019t  stop, Ünal-3!") == "don't stop ünal 3"
    assert exact(" Don't  stop! ") == "Don't stop!"


class Steps:
    whole = False

    def steps_of(self, part):
        return part


def test_what_is_too_short_is_named():
    records = [record("abb", "long", audio=4), record("abb", "short", audio=3), record("abb", "no")]
    assert [each.id for each in DIGITS.too_short(Steps(), records)] == ["short"]
    assert not replace(DIGITS, slots=2).too_short(Steps(), records)

    def damaged(part):
        raise SoundError("a.flac", "damaged")

    unread = Steps()
    unread.steps_of = damaged
    assert not DIGITS.too_short(unread, records)  # they are named where they are read


def test_a_sound_that_may_be_cut_is_refused():
    with pytest.raises(ValueError, match="audio.longer='leave_out'.*whole sound"):
        DIGITS.preparer(Steps(), ())
    audio = AudioModality("audio", std=1.0, longer="leave_out")
    assert DIGITS.preparer(audio, ()).absent()["units"].shape == (3,)
    with pytest.raises(ValueError, match="longer='leave_out'"):
        DIGITS.preparer(replace(audio, roll=True), ())
    with pytest.raises(ValueError, match="alphabet is empty"):
        replace(DIGITS, alphabet=()).head()
