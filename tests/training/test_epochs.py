"""Training for so many passes over the examples, through the command."""

import json

import commands
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.runs.folder import RunFolder
from unified_mm.training.setup import prepare

SMALL = [flag for flag in commands.SMALL if not flag.startswith("--config.train.steps")]


def train(data, workdir, *more, recipe="coco"):
    return commands.run(
        f"--config=configs/{recipe}.py:tiny",
        *SMALL,
        f"--config.data.dir={data}",
        f"--config.data.cache_dir={data.parent / 'cache'}",
        f"--workdir={workdir}",
        *more,
    )


def test_epochs_are_as_many_steps_as_the_examples_make(tmp_path, capsys):
    data, run = tiny.write_coco(tmp_path / "coco"), tmp_path / "run"
    (data / "images" / "train" / "5.jpg").write_bytes(b"no picture")
    loose = "--config.data.max_bad_share=0.5"
    assert train(data, run, "--config.train.epochs=0.5", loose) == 0
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 2  # 11.5 of 8
    assert json.loads((run / "result.json").read_text())["steps"] == 2
    capsys.readouterr()
    assert train(data, run, "--config.train.epochs=0.5", loose) == 0
    assert "is finished" in capsys.readouterr().out

    assert train(data, tmp_path / "a", "--config.train.epochs=1", "--config.train.steps=4") == 1
    assert "train.epochs=1 and train.steps=4 both say how long" in capsys.readouterr().err
    assert train(data, tmp_path / "b", "--config.train.epochs=1", recipe="coco_flamingo") == 1
    assert "train.epochs is for runs of one phase" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b" / "config.json").exists()


def test_steps_that_are_not_the_epochs_are_refused(tmp_path):
    data = tiny.write_coco(tmp_path / "coco")
    config = tiny.config_dict(
        data__dir=str(data), data__cache_dir=str(tmp_path), train__epochs=2.0, train__steps=5
    )
    with pytest.raises(ValueError, match="train.epochs=2 of 24 examples are 6 steps"):
        prepare(Config(config.to_dict()), RunFolder(tmp_path / "run"), lambda _: None)
