"""Captions one by one."""

import numpy as np
import pytest

from unified_mm.analysis.captions import best_and_worst, by_group, judge
from unified_mm.evaluation.caption_scores import caption_scores

CAPTIONS = ["a red cube", "a blue ball", "nothing at all", "a green cone"]
REFERENCES = [["a red cube"], ["a blue cube", "a blue ball there"], ["a tall tree"], ["green"]]


def test_the_mean_of_all_is_the_score_of_the_corpus():
    judged = judge(CAPTIONS, REFERENCES)
    assert [each.place for each in judged] == [0, 1, 2, 3]
    assert [each.caption for each in judged] == CAPTIONS
    mean = np.mean([each.cider_d for each in judged])
    assert mean == pytest.approx(caption_scores(CAPTIONS, REFERENCES)["cider_d"])
    best, worst = best_and_worst(judged, 2)
    assert best[0].caption == "a red cube" and best[0].cider_d >= best[1].cider_d
    assert worst[0].caption == "nothing at all" and worst[0].cider_d == 0
    assert worst[1].cider_d <= best[1].cider_d


def test_captions_in_a_language_without_spaces_are_judged_by_characters():
    captions = ["一个红色的立方体", "蓝色的球在左边", "一棵树"]
    references = [["一个红色的立方体"], ["一个蓝色的球在右边"], ["绿色的圆锥"]]
    judged = judge(captions, references)
    mean = np.mean([each.cider_d for each in judged])
    assert mean == pytest.approx(caption_scores(captions, references)["characters/cider_d"])
    assert judged[0].cider_d > judged[1].cider_d > 0.1 and judged[2].cider_d == 0


def test_groups_may_overlap_and_empty_ones_go():
    scores = np.array([1.0, 2.0, 3.0])
    groups = {
        "red": np.array([True, True, False]),
        "blue": np.array([False, True, True]),
        "green": np.zeros(3, bool),
    }
    found = by_group(scores, groups)
    assert {name: each.mean for name, each in found.items()} == {"red": 1.5, "blue": 2.5}
