"""Training for so many passes over the examples."""

import commands
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.runs.folder import RunFolder
from unified_mm.training.setup import prepare


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("coco", ("--config.train.steps=4",), "train.epochs=1 and train.steps=4 both say how long"),
        ("coco_flamingo", (), "train.epochs is for runs of one phase"),
    ],
)
def test_epochs_beside_steps_or_phases_are_refused(tmp_path, capsys, recipe, more, message):
    """tests/test_unreadable_images.py trains for as many as are asked for."""
    data, run = tiny.write_coco(tmp_path / "coco"), tmp_path / "run"
    small = [flag for flag in commands.SMALL if not flag.startswith("--config.train.steps")]
    flags = (f"--config=configs/{recipe}.py:tiny", *small, "--config.train.epochs=1", *more)
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    assert commands.run(*flags, f"--config.data.dir={data}", cache, f"--workdir={run}") == 1
    assert message in capsys.readouterr().err
    assert not (run / "config.json").exists()


def test_steps_that_are_not_the_epochs_are_refused(tmp_path):
    data = tiny.write_coco(tmp_path / "coco")
    config = tiny.config_dict(
        data__dir=str(data), data__cache_dir=str(tmp_path), train__epochs=2.0, train__steps=5
    )
    with pytest.raises(ValueError, match="train.epochs=2 of 24 examples are 6 steps"):
        prepare(Config(config.to_dict()), RunFolder(tmp_path / "run"), lambda _: None)
