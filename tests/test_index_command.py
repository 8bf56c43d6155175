"""`python -m unified_mm.index` as a user types it, on a run that was never trained."""

import errno
import functools
import json
import os
import re
import signal
import sys
import time

import numpy as np
import processes
import pytest
import tiny
from PIL import Image

from unified_mm import index as command
from unified_mm.inference import loaded
from unified_mm.search import index_writer
from unified_mm.search.search_index import SearchIndex


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """A run that several commands name is loaded, and its functions compiled, by the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded, "load", functools.cache(loaded.load))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return tiny.write_run(folder / "run", tiny.config_dict(), tiny.params(tiny.task()))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tiny.write_coco(tmp_path_factory.mktemp("data") / "coco", train=5, val=12)
    (folder / "images" / "val" / "4.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def made(trained, coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes") / "coco"
    assert run(f"--run={trained}", f"--images={coco}", f"--out={out}") == 0
    return out


def test_it_is_made_and_said(trained, coco, made, tmp_path, capsys):
    out = tmp_path / "val"
    arguments = (f"--run={trained}", f"--images={coco}", "--split=val", f"--out={out}")
    assert run(*arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"12 pictures and 24 captions of val in {coco}",
        "left out: 1 x not an image of a known format (images/val/4.jpg)",
        f"index of 11 pictures (all compared) and 22 captions (all compared) in {out}",
    ]
    assert run(*arguments, "--exact_up_to=3") == 1
    assert "is of another --exact_up_to: name a new one" in capsys.readouterr().err
    assert run(f"--run={trained}", f"--images={coco}", f"--out={out}") == 1
    assert "is of another split: name a new one" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert "is made already, of the same pictures with the same" in capsys.readouterr().out
    assert SearchIndex.open(made).header["splits"] == ["train", "val"]


def test_text_and_picture_and_both_are_looked_for(trained, coco, made, capsys):
    picture = coco / "images" / "val" / "7.jpg"
    asked = (f"--run={trained}", f"--index={made}")

    def found(*arguments):
        assert run(*asked, *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        scores = [float(line.split()[0]) for line in lines]
        assert scores == sorted(scores, reverse=True)
        return [line.split("  ", 1)[1] for line in lines]

    assert found(f"--query_image={picture}", "--top=2")[0] == "images/val/7.jpg"
    by_text = found("--query=a red square")
    assert len(by_text) == 10 and all(line.startswith("images/") for line in by_text)
    both = (f"--query_image={picture}", "--query=a red square")
    assert found(*both, "--image_weight=0") == by_text
    assert found(*both, "--image_weight=1") == found(f"--query_image={picture}")
    texts = found(f"--query_image={picture}", "--kind=text", "--top=40")
    assert len(texts) == 32 and "green, size 3  (images/val/7.jpg)" in texts


@pytest.mark.parametrize("exact_up_to", [0, 100])
def test_it_is_scored(trained, coco, tmp_path, capsys, exact_up_to):
    out, output = tmp_path / "index", tmp_path / "scores.json"
    arguments = (f"--run={trained}", f"--images={coco}", f"--out={out}", "--evaluate")
    assert run(*arguments, f"--exact_up_to={exact_up_to}", f"--output={output}") == 0
    said = capsys.readouterr().out.splitlines()
    result = json.loads(said[-1])
    assert result == json.loads(output.read_text())
    assert result["graph"] == dict.fromkeys(("image", "text"), exact_up_to == 0)
    assert result["vectors"] == {"image": 16, "text": 32} and result["left_out"] == 1
    assert result["scores"]["index/image_to_image/recall_at_10"] == 1
    names = ["text_to_image/map_at_10", "image_to_text/map_at_10"]
    assert list(result["scores"])[-2:] == names
    assert all(any(line.startswith(name) for line in said) for name in result["scores"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do: give --images or --query"),
        (("--query= ",), "--query is empty"),
        (("--query=x", "--top=0"), "--top: 0 must be at least 1"),
        (
            ("--evaluate", "--top=3"),
            "--top is read beside --query or --query_image or --query_item alone",
        ),
        (("--query=x", "--shard=3"), "--shard is read beside --images alone"),
        (("--query=x", "--image_weight=0.3"), "--query and --query_image are both"),
        (
            ("--query=x", "--query_image=y", "--image_weight=2"),
            "--image_weight: 2 must be at least 0 and at most 1",
        ),
        (("--query=x", "--output=a.json"), "--output is read beside --evaluate alone"),
        (("--query_image=nowhere.jpg",), "there is no image 'nowhere.jpg'"),
        (("--query=x", "--out=nowhere"), "nowhere is no search index"),
        (("--query=x", "--run=nowhere"), "nowhere is no run"),
        (("--query=x", "--indx=a"), "--indx=a is no flag; did you mean --index?"),
        (("--images=nowhere", "--out=new"), "nowhere is no folder"),
        (("--images=.", "--split=val", "--out=new"), "no splits to choose from"),
        (("--images={coco}", "--split=test", "--out=new"), "has no split 'test'"),
        (("--images={coco}", "--out={coco}"), "exists and is no index: name a new one"),
        (("--evaluate", "--output={coco}"), "exists and is not overwritten"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    trained, coco, made, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(coco=coco) for argument in arguments]
    index = [] if any(each.startswith("--out=") for each in given) else [f"--index={made}"]
    assert run(f"--run={trained}", *index, *given) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_an_index_of_another_checkpoint_is_refused(made, tmp_path, capsys):
    params = tiny.params(tiny.task(), 1)
    other = tiny.write_run(tmp_path / "run", tiny.config_dict(), params, step=9)
    assert run(f"--run={other}", f"--index={made}", "--query=x") == 1
    error = capsys.readouterr().err
    assert re.search("made with another model: step 7, .*; this run has step 9, .* make it", error)


def test_a_disk_that_fills_up_is_told(trained, coco, tmp_path, monkeypatch, capsys):
    written = iter(range(2))

    def write(path, content):
        if next(written, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_bytes(content)

    monkeypatch.setattr(index_writer, "write_atomically", write)
    out = tmp_path / "index"
    assert run(f"--run={trained}", f"--images={coco}", f"--out={out}", "--shard=4") == 1
    error = capsys.readouterr().err
    assert f"error: no space left on device for {out}; 2 shards are whole" in error


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(trained, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(400):
        pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:03}.png")

    def start(out):
        asked = (f"--run={trained}", f"--images={pictures}", f"--out={out}", "--shard=2")
        environment = {**os.environ, "PYTHONPATH": str(processes.ROOT)}
        return processes.started(
            environment, sys.executable, "-m", "unified_mm.index", *asked, "--exact_up_to=10"
        )

    out, whole = tmp_path / "index", tmp_path / "whole"
    work = tmp_path / ".index.indexing"
    for wanted in (10, 60):
        with start(out) as process:
            while len(list(work.glob("shard-*.npz"))) < wanted:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
        assert not out.exists()
    with start(out) as process:
        said = process.communicate()[0]
    before = int(re.search(r"(\d+) of 200 shards are whole", said)[1])
    assert 60 <= before < 200 and process.returncode == 0
    with start(whole) as process:
        assert process.communicate() and process.returncode == 0
    for name in ("image.npy", "rows.json", "index.json"):  # threads decide the graph's edges
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert len(SearchIndex.open(out).rows.names) == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "pictures", "whole"]
