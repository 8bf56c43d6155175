"""Which way a score is better: known of every score there is, and of no other."""

import pytest

from unified_mm.evaluation.directions import higher_is_better


@pytest.mark.parametrize(
    "score",
    [
        "text_to_image/recall_at_1",
        "single_caption/image_to_text/recall_at_10",
        "caption/cider_d",
        "caption/bleu_4",
        "caption/rouge_l",
        "caption/image_gain",
        "caption/image_gain_low",
        "foil/accuracy",
        "foil/accuracy/colour",
        "answer/accuracy/answer_type/yes/no",
        "few_shot/4/answer/accuracy",
        "test_composition/caption/cider_d",
        "zero_shot/accuracy_at_5",
        "zero_shot/mean_per_class",
        "index/text_to_image/recall_at_10",
        "text_to_image/map_at_10",
    ],
)
def test_more_is_better(score):
    assert higher_is_better(score)


@pytest.mark.parametrize(
    "score",
    ["caption/nats", "loss", "contrastive/loss", "audio_to_text/median_rank", "answer/ece"],
)
def test_less_is_better(score):
    assert not higher_is_better(score)


def test_what_is_not_known_is_refused_with_what_is():
    with pytest.raises(ValueError, match=r"'caption/niceness' .*cider_d.* \(more .*nats"):
        higher_is_better("caption/niceness")
