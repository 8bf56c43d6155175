"""Word and character error rates, by hand, and silence that stays empty."""

import pytest
import tiny

from unified_mm.data.negatives import negatives
from unified_mm.data.records import Manifest
from unified_mm.evaluation.directions import higher_is_better
from unified_mm.evaluation.evaluate import Split, check_split
from unified_mm.evaluation.transcripts import empty_shares, transcript_scores
from unified_mm.modalities.audio import AudioModality

AUDIO = {"image": object(), "audio": AudioModality("audio", std=1.0)}


def test_error_rates_by_hand():
    pytest.importorskip("jiwer")
    references = ["one two", "three", "Three.", ""]
    found, control = transcript_scores(["one too", "", "three!", "a"], references, "plain")
    # Four words: one is another, one is missing, one too many.
    assert found["wer"] == pytest.approx(3 / 4) and found["accuracy"] == 1 / 4
    assert found["cer"] == pytest.approx((1 + 5 + 1) / 17)
    assert control["wer"] == pytest.approx((2 + 1) / 4) and control["accuracy"] == 2 / 4
    other, _ = transcript_scores(["three"], ["Three."], "exact")
    assert other["wer"] == 1.0
    with pytest.raises(ValueError, match="no transcript has a word"):
        transcript_scores(["a"], ["?"], "plain")


def test_what_is_written_about_silence_counts():
    made = negatives(AUDIO, 4)
    assert [record.id for record in made] == ["silence 0", "noise 1", "silence 2", "noise 3"]
    found = empty_shares(made, ["", "", "a", ""])
    assert found == {"empty_on_noise": 1.0, "empty_on_silence": 0.5}
    with pytest.raises(ValueError, match="negatives are made of sounds, and the model reads image"):
        negatives({"image": object()}, 4)


def test_a_model_that_writes_nothing_is_not_asked_about_silence():
    split = Split(Manifest("val", (), "folder", "folder", ""), negatives=negatives(AUDIO, 4))
    changes = {"objectives__captioning__weight": 0.0, "objectives__matching__weight": 0.0}
    with pytest.raises(ValueError, match="evaluation.negatives=4: this model writes nothing"):
        check_split(split, tiny.task(**changes))


def test_fewer_errors_are_better():
    for name, higher in {
        "caption/wer": False,
        "val/transcription/cer": False,
        "transcription/accuracy": True,
        "caption/empty_on_noise": True,
        "caption/audio_gain_low": True,
    }.items():
        assert higher_is_better(name) == higher
