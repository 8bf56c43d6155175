"""`python -m unified_mm.generate` as a user types it, on a model that writes varied texts."""

import argparse
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import unified_mm
from unified_mm import generate, main
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.loaded import BATCH, LoadedModel


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run's folder, two pictures, and the run loaded."""
    folder = tmp_path_factory.mktemp("generate")
    changes = {"objectives__matching__weight": 0.0}
    task = tiny.task(**changes)
    params = tiny.writing_params(task, task.tokenizer.eos_id)
    run = tiny.write_run(folder / "run", tiny.config_dict(**changes), params, None)
    rng = np.random.default_rng(0)
    images = [folder / f"{number}.png" for number in range(2)]
    for path in images:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return run, [str(path) for path in images], unified_mm.load(run)


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(argument) for argument in arguments])
    return stopped.value.code


def of(images):
    return [part for image in images for part in ("--image", image)]


def test_a_line_for_each_image(written, capsys):
    run, images, model = written
    assert command("--run", run, *of(images)) == 0
    expected = [f"{i}: {text}" for i, text in zip(images, model.caption(images), strict=True)]
    said = capsys.readouterr()
    assert said.out.splitlines() == expected and "empty" not in said.err
    assert command("--run", run, *of(images), "--prompt", "a red", "--tokens", 3) == 0
    answers = model.answer(images, ["a red"] * 2, Decoding(tokens=3))
    expected = [f"{i}: {text}" for i, text in zip(images, answers, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected


def test_texts_that_end_at_once_are_counted(written, tmp_path, capsys):
    _, images, model = written
    text, end = model.params["embedders_text"], model.task.tokenizer.eos_id
    for size in (100, -100):  # one of them makes the end likeliest at first
        tokens = text["tokens"].at[end].multiply(size)
        params = {**model.params, "embedders_text": {**text, "tokens": tokens}}
        ends = tiny.write_run(
            tmp_path / str(size), tiny.config_dict(objectives__matching__weight=0.0), params, None
        )
        assert command("--run", ends, *of(images[:1])) == 0
        said = capsys.readouterr()
        if said.out == f"{images[0]}: \n":
            assert "1 of 1 texts are empty" in said.err and f"{model.step:,} steps" in said.err
            break
    else:
        pytest.fail("no text was empty")


def test_samples_beams_and_json(written, capsys):
    run, images, model = written
    drawn = ("--temperature", 1.5, "--top_k", 20, "--top_p", 0.9, "--samples", 3, "--seed", 4)
    assert command("--run", run, *of(images), *drawn, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    decoding = Decoding(temperature=1.5, top_k=20, top_p=0.9, samples=3, seed=4)
    expected = [text for texts in model.generate(images, ["", ""], decoding) for text in texts]
    assert [line["text"] for line in lines] == [text.text for text in expected]
    assert [line["image"] for line in lines] == [image for image in images for _ in range(3)]
    nats = [text.log_likelihood for text in expected]
    np.testing.assert_allclose([line["nats"] for line in lines], nats)
    assert command("--run", run, *of(images[:1]), "--beams", 3, "--samples", 2, "--json") == 0
    best, second = (json.loads(line)["text"] for line in capsys.readouterr().out.splitlines())
    assert best != second


def test_pieces_and_other_ways_of_computing(written, capsys):
    run, images, model = written
    assert command("--run", run, *of(images), "--stream") == 0
    expected = [f"{i}: {text}" for i, text in zip(images, model.caption(images), strict=True)]
    assert capsys.readouterr().out.splitlines() == expected
    assert command("--run", run, *of(images), "--cache", "int8", "--dtype", "bfloat16") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    small = model.with_options(cache="int8", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(small.params)} == {np.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--temperature", -1), "temperature=-1.0: must be at least 0"),
        (("--samples", 2), "give a temperature, or beams"),
        (("--stream", "--beams", 2), "--stream prints one text"),
        (("--stop", "no single token"), "is no single token of this model's tokenizer"),
        (("--prompt", "a very long prompt " * 9), "no room is left for an answer"),
    ],
)
def test_what_makes_no_sense_is_one_line(written, arguments, named, capsys):
    run, images, _ = written
    assert command("--run", run, *of(images), *arguments) == 1
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


def test_no_run_and_no_image_are_said(written, tmp_path, capsys):
    run, images, _ = written
    assert command("--run", tmp_path / "none", *of(images)) == 1
    assert "is no run" in capsys.readouterr().err
    assert command("--run", run, "--image", tmp_path / "none.png") == 1
    assert "there is no image" in capsys.readouterr().err


@pytest.fixture
def folder(written, tmp_path):
    """A folder with pictures below it, one broken, and what is no picture."""
    _, images, _ = written
    below = tmp_path / "many" / "below"
    below.mkdir(parents=True)
    for number in range(40):
        shutil.copy(images[number % 2], below / f"{number:02}.PNG")
    (tmp_path / "many" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "many" / "notes.txt").write_text("notes")
    return tmp_path / "many"


def test_a_folder_is_read_without_what_is_broken(written, folder, tmp_path, capsys):
    run, images, model = written
    output = tmp_path / "new.json"
    assert command("--run", run, "--image", folder, "--image", images[0], "--output", output) == 0
    said = capsys.readouterr()
    expected = model.caption([images[number % 2] for number in range(40)] + [images[0]])
    lines = said.out.splitlines()
    assert lines[0] == f"{folder}/below/00.PNG: {expected[0]}" and len(lines) == 42
    assert "1 of 42 pictures were left out" in said.err and "broken.jpg: not an image" in said.err
    results = json.loads(output.read_text())
    assert [each["caption"] for each in results] == expected
    assert results[1] == {
        "image_id": "below/01.PNG",
        "file_name": "below/01.PNG",
        "caption": expected[1],
    }
    assert command("--run", run, "--image", folder, "--output", output) == 1
    assert "not overwritten" in capsys.readouterr().err
    assert command("--run", run, "--image", folder / "below", "--stream", "--output", "x") == 1
    capsys.readouterr()
    assert command("--run", run, "--image", folder / "broken.jpg", *of(images[:1]), "--stream") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{images[0]}: {expected[0]}"] and "left out" in said.err


@pytest.mark.parametrize("ended", ["interrupted", "out of memory"])
def test_what_was_written_before_the_end_is_kept(written, folder, tmp_path, capsys, ended):
    run, _, _ = written
    output = tmp_path / "new.json"
    generate_rows = LoadedModel.generate_rows

    def once(model, rows, prompts, decoding, first):
        if first:
            raise ValueError(ended)
        texts = generate_rows(model, rows, prompts, decoding, first)
        if ended == "interrupted":
            signal.raise_signal(signal.SIGINT)
        return texts

    before = signal.getsignal(signal.SIGINT)
    arguments = ["--run", run, "--image", folder / "below", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "generate_rows", once)
        if ended == "interrupted":
            options = generate.main.options_of([str(each) for each in arguments])
            assert generate.main.work(options) == 128 + signal.SIGINT
        else:
            assert command(*arguments) == 1
    said = capsys.readouterr()
    assert f"{BATCH} texts in {output}" in said.out and ended in said.err
    assert len(json.loads(output.read_text())) == BATCH < 40
    assert signal.getsignal(signal.SIGINT) is before


def test_answers_bear_their_question_and_pictures_of_a_coco_set_their_ids(
    written, tmp_path, capsys
):
    run, _, _ = written
    data = tiny.write_coco(tmp_path / "coco", train=2, val=3)
    output = tmp_path / "answers.json"
    asked = ("--image", data, "--prompt", "red?", "--output", output)
    assert command("--run", run, *asked) == 0
    results = json.loads(output.read_text())
    assert [each["image_id"] for each in results] == [0, 1, 0, 1, 2]
    assert results[4]["file_name"] == "images/val/2.jpg" and results[4]["question"] == "red?"
    assert {"answer"} == results[4].keys() - {"image_id", "file_name", "question"}


def test_nothing_that_can_be_read_is_an_error(written, folder, tmp_path, capsys):
    run, _, _ = written
    assert command("--run", run, "--image", folder / "broken.jpg") == 1
    assert "cannot be decoded" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command("--run", run, "--image", tmp_path / "empty") == 1
    assert "holds no image" in capsys.readouterr().err


def test_all_commands_agree_on_what_a_picture_is(written, folder):
    from unified_mm.search.items import read_items

    _, _, model = written
    wanted = [str(folder / name) for name in read_items(folder).names]
    assert [picture.path for picture in generate.listed([str(folder)])] == wanted
    options = argparse.Namespace(images=str(folder))
    assert main.searched_images(model, options) == wanted and len(wanted) == 41
