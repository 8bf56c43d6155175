"""Rules over parameter paths: the first that matches wins, and none may be idle."""

import pytest

from unified_mm.training.optimizer import match_rules

TREE = {"text": {"table": 0, "norm": {"scale": 0}}, "image": {"kernel": 0}}


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = (("text/norm/.*", 1), ("text/.*", 2), (".*", 3))
    assert match_rules("f", rules, TREE) == {
        "text": {"table": 2, "norm": {"scale": 1}},
        "image": {"kernel": 3},
    }


def test_a_rule_left_with_nothing_is_refused_and_the_last_may_be():
    for idle in ("txt/.*", "text", "kernel"):  # a pattern must match the whole path
        with pytest.raises(ValueError, match=f"train.x: no parameter is left for the rule '{idle}"):
            match_rules("train.x", ((idle, 1), (".*", 2)), TREE)
    with pytest.raises(ValueError, match="no parameter is left for the rule 'text/table'"):
        match_rules("train.x", (("text/.*", 1), ("text/table", 2), (".*", 3)), TREE)
    assert match_rules("f", (("text/.*", 1), ("image/.*", 2), (".*", 3)), TREE)["image"] == {
        "kernel": 2
    }


def test_a_parameter_that_no_rule_covers_is_refused():
    with pytest.raises(ValueError, match="train.x: no rule covers parameter 'image/kernel'; end"):
        match_rules("train.x", (("text/.*", 1),), TREE)
