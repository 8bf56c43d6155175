"""`python -m unified_mm.probe` as a user types it, on a run in a small world."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from unified_mm import probe
from unified_mm.world.scenes import ATTRIBUTES


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        probe.main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIFIED_MM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny.write_world_run(tmp_path_factory.mktemp("runs") / "run")


def last_line(capsys):
    said = capsys.readouterr().out
    return said, json.loads(said.splitlines()[-1])


def test_layers_are_probed_for_what_the_world_holds(finished, tmp_path, capsys):
    output = tmp_path / "probes.json"
    assert run("--run", finished, "--output", output, "--train", 30) == 0
    said, result = last_line(capsys)
    assert result == json.loads(output.read_text())
    assert list(result["scores"]) == ["embedded", "layer_0", "layer_1", "output"]
    count = 1 + sum(map(len, ATTRIBUTES.values()))
    for scores in (*result["scores"].values(), result["chance"], result["majority"]):
        assert len(scores) == count and all(0 <= value <= 1 for value in scores.values())
    assert result["train"] == 30 and result["asked"] == 20 and result["data"]["split"] == "val"
    head = next(line for line in said.splitlines() if line.startswith("accuracy"))
    assert head.split() == ["accuracy", "objects", *ATTRIBUTES]
    assert run("--run", finished, "--of", "text", "--asked", 10) == 0
    assert last_line(capsys)[1]["asked"] == 10


def test_classes_of_a_folder_are_probed(finished, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (tmp_path / name).mkdir()
        for number in range(8):
            pixels = np.clip(rng.integers(-20, 20, (20, 20, 3)) + colour, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "red" / "broken.png").write_bytes(b"no picture")
    assert run("--run", finished, "--images", tmp_path) == 0
    said, result = last_line(capsys)
    assert "left out: red/broken.png" in said
    assert result["train"] == result["asked"] == 8
    assert all(scores == {"class": 1.0} for scores in result["scores"].values())
    assert result["chance"] == result["majority"] == {"class": 0.5}
    for name in ("blue", "red"):
        for number in range(2, 8):
            (tmp_path / name / f"{number}.png").unlink()
    assert run("--run", finished, "--images", tmp_path) == 1
    assert f"{tmp_path}: fewer than three images to learn from" in capsys.readouterr().err
    (tmp_path / "blue" / "1.png").unlink()
    assert run("--run", finished, "--images", tmp_path) == 1
    assert "fewer than two images that can be read of blue" in capsys.readouterr().err


def test_what_images_contribute(finished, capsys):
    assert run("--run", finished, "--contribution", "--asked", 12) == 0
    said, result = last_line(capsys)
    assert list(result["contribution"]) == ["whole", "dropped", "blanked", "shuffled"]
    assert result["contribution"]["whole"]["nats_lost"]["mean"] == 0
    assert result["images"] == 12 and "CIDEr-D" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--images", "x", "--contribution"), "--contribution is not read beside --images"),
        (("--images", "x", "--of", "text"), "a class has no texts"),
        (("--contribution", "--of", "text"), "--of is not read beside --contribution"),
        (("--train", "2"), "--train=2: must be 3 or more"),
    ],
)
def test_options_that_do_not_go_together(arguments, said, tmp_path, capsys):
    assert run("--run", tmp_path, *arguments) == 1
    assert said in capsys.readouterr().err
