"""Which state is the best so far."""

from types import SimpleNamespace
from unittest.mock import Mock

import jax.numpy as jnp
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.training.loop import is_better, keep_best
from unified_mm.training.setup import Setup, best_score

NAN = float("nan")
CAPTIONED = SimpleNamespace(questions=(), captioned=["a record"])


class Saved(Checkpoints):
    """The checkpoints of `best/`: one, or none."""

    def __init__(self, step=None, value=None):
        self._metadata = {"step": step, "value": value}

    def steps(self):
        return () if self._metadata["step"] is None else (self._metadata["step"],)

    def metadata(self):
        return self._metadata


@pytest.mark.parametrize(
    ("saved", "value", "higher", "lower"),
    [
        (Saved(), 2.0, True, True),
        (Saved(), NAN, False, False),
        (Saved(1, 1.0), 2.0, True, False),
        (Saved(1, 1.0), 0.5, False, True),
        (Saved(1, 1.0), 1.0, False, False),
        (Saved(1, 1.0), NAN, False, False),
        (Saved(2, 1.0), 2.0, False, False),
        (Saved(2, 1.0), 0.5, False, False),
    ],
)
def test_better_is_by_the_direction_of_the_score(saved, value, higher, lower):
    assert is_better(saved, 2, value, higher=True) == higher
    assert is_better(saved, 2, value, higher=False) == lower


@pytest.mark.parametrize(("score", "kept"), [("caption/nats", "2"), ("caption/cider_d", "3")])
def test_the_best_is_the_lowest_where_less_is_better(tmp_path, score, kept):
    setup = Mock(spec=Setup, best_by=score, folder=RunFolder(tmp_path))
    state = tiny.state({"scale": jnp.zeros(2)}, 3)
    for step, value in ((1, 1.5), (2, 1.0), (3, 2.0)):
        keep_best(setup, state, step, value, {"step": step})
    with Checkpoints(setup.folder.best, read_only=True) as best:
        assert best.metadata()["score"] == score
    assert [path.name for path in setup.folder.best.iterdir()] == [kept]


def test_a_score_of_no_known_direction_is_refused_before_the_first_step():
    def options(**changes):
        return best_score(Config(tiny.config_dict(**changes).to_dict()), CAPTIONED)

    with pytest.raises(ValueError, match=r"evaluation\.best_by: .*'caption/niceness'.*cider_d"):
        options(evaluation__every=2, evaluation__best_by="caption/niceness")
    assert options(evaluation__every=2, evaluation__best_by="caption/nats")
    assert options(evaluation__best_by="caption/niceness")  # it keeps none, as runs there were
