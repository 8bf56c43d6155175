"""What texts cost to write, against counts by hand."""

import numpy as np
import pytest
import tiny
from hand_counts import text_by_hand as by_hand

from unified_mm.inference.text_flops import text_flops


@pytest.fixture(scope="module")
def predictor():
    model = tiny.loaded(model__exits=(1,), objectives__exits__weight=1.0)
    return model.predictor


@pytest.mark.parametrize("left", [None, 0.0, 0.25, 1.0])
def test_a_caption_costs_what_its_tokens_run(predictor, left):
    found = text_flops(predictor, ["", ""], np.array([4.0, 6.0]), () if left is None else (left,))
    assert found == pytest.approx(by_hand(1, 4, left) + by_hand(1, 6, left), rel=1e-6)


def test_answers_count_with_their_prompts_and_without_their_pictures(predictor):
    """A prompt is filled up to 16 tokens, here to the 12 that the model reads."""
    questions, tokens = ["a red", "a blue"], np.array([1.0, 3.0])
    found = text_flops(predictor, questions, tokens)
    assert found == pytest.approx(by_hand(12, 1) + by_hand(12, 3), rel=1e-6)
    alone = text_flops(predictor.without_context(), questions, tokens)
    expected = by_hand(12, 1, patches=0) + by_hand(12, 3, patches=0)
    assert alone == pytest.approx(expected, rel=1e-6)
    assert text_flops(predictor, [], np.zeros(0)) == 0


def test_as_many_shares_as_exits_are_wanted(predictor):
    with pytest.raises(ValueError, match="argument 2 is longer"):
        text_flops(predictor, [""], np.array([3.0]), (0.5, 0.5))
