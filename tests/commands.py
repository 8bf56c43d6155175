"""The main command within this process, as a user would type it."""

from __future__ import annotations

import pytest

from unified_mm import main as command
from unified_mm.training import run as training
from unified_mm.training import setup
from unified_mm.training.loop import Stopped


def run(*arguments: str) -> int:
    """The exit code of `python -m unified_mm.main ARGUMENTS`."""
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    return int(stopped.value.code or 0)


def run_uncounted(*arguments: str) -> int:
    """The same of a run that nobody asks for what it costs, which is counted by tracing it anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "run_summary", lambda *_: "")
        patch.setattr(training, "run_flops", lambda _: 0)
        return run(*arguments)


def train(*arguments: str) -> None:
    """Runs it up to where it would score: for what is asked of its steps alone."""

    def stop(ready, *_):
        raise Stopped(ready.options.train.steps, 75)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "score_splits", stop)
        assert run_uncounted(*arguments) == 75


# Of any recipe.
SHRUNK = (
    "--config.data.image_size=16",
    "--config.data.vocabulary_size=300",
    "--config.model.width=16",
    "--config.model.layers=2",
    "--config.model.unroll=1",
    "--config.model.heads=2",
    "--config.model.feed_forward=32",
    "--config.model.modalities.text.length=12",
    "--config.train.batch_size=8",
    "--config.train.steps=4",
    "--config.train.warmup_steps=1",
    "--config.checkpoint.every=2",
    "--config.logging.every=2",
    "--config.evaluation.batch_size=8",
    "--config.logging.tensorboard=False",  # to import it takes seconds
)
# Of a recipe whose patches are large: a picture of several.
SMALL = (*SHRUNK, "--config.model.modalities.image.patch=8")
