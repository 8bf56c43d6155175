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
    return commands.run(
        RECIPE,
        *commands.SMALL,
        f"--config.data.dir={data}",
        f"--config.data.cache_dir={data.parent / 'cache'}",
        "--config.data.check_at_most=1",
        f"--workdir={workdir}",
        *more,
    )


def test_what_is_met_later_is_said_once_and_too_much_of_it_ends_the_run(data, tmp_path, capsys):
    # Six steps of eight are two epochs: the image is met twice.
    more = ("--config.data.max_bad_share=0.5", "--config.train.steps=6")
    assert train(data, tmp_path / "run", *more) == 0
    out = capsys.readouterr().out
    assert out.count("cannot be read, so it counts as absent: image: ") == 1 and "5.jpg" in out
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) >= 2
    assert (tmp_path / "run" / "result.json").is_file()

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
