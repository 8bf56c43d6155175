"""Of a large set a sample is checked: what is met later and cannot be read, through the command."""

import json

import commands
import pytest
import tiny

RECIPE = "--config=configs/coco.py:tiny"


@pytest.fixture
def data(tmp_path):
    """Twenty-four training images of which one is damaged, and is not among those checked."""
    folder = tiny.write_coco(tmp_path / "coco")
    (folder / "images" / "train" / "5.jpg").write_bytes(b"no picture")
    return folder


def train(data, workdir, *more):
    return commands.run_uncounted(
        RECIPE,
        *(flag for flag in commands.SMALL if not flag.startswith("--config.train.steps")),
        "--config.train.epochs=2",
        "--config.objectives.captioning.weight=0.0",  # images alone are asked about
        f"--config.data.dir={data}",
        f"--config.data.cache_dir={data.parent / 'cache'}",
        "--config.data.check_at_most=1",
        f"--workdir={workdir}",
        *more,
    )


def test_what_is_met_later_is_said_once_and_too_much_of_it_ends_the_run(data, tmp_path, capsys):
    # Two epochs of twenty-four are six steps of eight: the image is met twice.
    loose = "--config.data.max_bad_share=0.5"
    assert train(data, tmp_path / "run", loose) == 0
    out = capsys.readouterr().out
    assert out.count("cannot be read, so it counts as absent: image: ") == 1 and "5.jpg" in out
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) >= 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 6
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6
    assert train(data, tmp_path / "run", loose) == 0
    assert "is finished" in capsys.readouterr().out

    folder = tmp_path / "strict"
    for number in range(1, 24):
        (data / "images" / "train" / f"{number}.jpg").write_bytes(b"no picture")
    assert train(data, folder, "--config.data.max_bad_share=0.1") == 1
    error = capsys.readouterr().err
    assert "allowed are 10.0%" in error and "unreadable.txt names them" in error
    assert "step 2 is saved" in error and not (folder / "result.json").exists()
    saved = json.loads((folder / "config.json").read_text())
    assert saved["data"]["check_at_most"] == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
