"""`python -m unified_mm.zero_shot` as a user types it, on a run of random weights."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from unified_mm import zero_shot


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        zero_shot.main([str(argument) for argument in arguments])
    return stopped.value.code


def write_run(folder, **changes):
    """A run of random weights with its one checkpoint, at step 1."""
    changes = {"objectives__matching__weight": 0.0, **changes}
    params = tiny.params(tiny.task(**changes))
    return tiny.write_run(folder, tiny.config_dict(**changes), params, step=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("contrast") / "run")


@pytest.fixture
def squares(tmp_path):
    """Seven classes of two pictures, one of which is no picture."""
    folder = tmp_path / "classes"
    for number in range(7):
        (folder / f"red_square-{number}").mkdir(parents=True)
        for name in ("a.png", "b.png"):
            pixels = np.full((20, 24, 3), 30 * number, np.uint8)
            Image.fromarray(pixels).save(folder / f"red_square-{number}" / name)
    (folder / "red_square-3" / "b.png").write_bytes(b"no picture")
    (folder / "README.md").write_text("seven squares")
    return folder


def test_a_run_classifies_a_folder(finished, squares, tmp_path, capsys):
    output = tmp_path / "scores.json"
    arguments = ("--run", finished, "--images", squares, "--max_bad_share", "0.1")
    assert run(*arguments, "--template", "{}", "--template", "a {}", "--output", output) == 0
    said = capsys.readouterr().out
    assert "left out: red_square-3/b.png (not an image of a known format)" in said
    assert "14 images of 7 classes" in said and "passed over: 1 files" in said
    result = json.loads(said.splitlines()[-1])
    assert result == json.loads(output.read_text())
    names = [f"zero_shot/accuracy/red square {number}" for number in range(7)]
    overall = ["zero_shot/accuracy_at_1", "zero_shot/accuracy_at_5", "zero_shot/mean_per_class"]
    assert list(result["scores"]) == list(result["chance"]) == overall + names
    assert result["chance"]["zero_shot/accuracy_at_5"] == pytest.approx(5 / 7)
    assert result["images"] == 13 and result["templates"] == ["{}", "a {}"]
    what = {"file": "red_square-3/b.png", "what": "not an image of a known format"}
    assert result["left_out"] == [what]
    assert result["step"] == 1 and len(result["classes"]) == 7
    assert run(*arguments, "--output", output) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert result == json.loads(output.read_text())


def test_without_templates_our_own_are_averaged(finished, squares, capsys):
    assert run("--run", finished, "--images", squares, "--max_bad_share=0.1") == 0
    said = capsys.readouterr().out
    assert len(json.loads(said.splitlines()[-1])["templates"]) > 1
    assert "filled templates are longer than the model reads" in said  # 12 tokens in this run


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ["--template", "a photo"], "the template 'a photo' must have the class's place"),
        (None, ["--template", "{} by {name}"], "no other field"),
        (None, [], "1 of the 14 images in .* are bad (7.1%, allowed are 5.0%)"),
        (None, ["--max_bad_share", "7"], "--max_bad_share: 7 must be at least 0 and at most 1"),
        (None, ["--run", "nowhere"], "nowhere is no run"),
        (None, ["--images", "nowhere"], "nowhere is no folder"),
        ("empty", [], "holds no image"),
        ("red-square_1", [], "both called 'red square 1'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    finished, squares, tmp_path, capsys, change, arguments, message
):
    if change:
        (squares / change).mkdir()
        if change != "empty":
            (squares / change / "a.png").touch()
    output = tmp_path / "scores.json"
    given = ["--run", finished, "--images", squares, "--output", output, *arguments]
    assert run(*given) == 1
    error = capsys.readouterr().err
    for part in message.split(" .* "):
        assert part in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not output.exists()


def test_a_run_without_contrast_is_refused(squares, tmp_path, capsys):
    workdir = write_run(tmp_path / "captions", objectives__contrastive__weight=0.0)
    assert run("--run", workdir, "--images", squares) == 1
    error = capsys.readouterr().err
    assert "error: this run cannot classify images: it was trained on captioning" in error
    assert error.count("\n") == 1
