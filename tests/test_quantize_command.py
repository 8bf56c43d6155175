"""`python -m unified_mm.quantize` as a user types it, and every command on what it writes."""

import json
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import tiny

import unified_mm
from unified_mm import export_weights, import_weights, quantize
from unified_mm.files import read_json, write_json
from unified_mm.inference.quantization import quantized
from unified_mm.inference.quantized_params import dequantized
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.training.start_from import part_of_run

TEXTS = ["a red square of size 1", "blue, size 2"]


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        quantize.main([str(argument) for argument in arguments])
    return stopped.value.code


def write_run(path, data, cache):
    """A run of random weights, as training leaves one at step 7."""
    changes = {
        "data__dir": str(data),
        "data__cache_dir": str(cache),
        "objectives__matching__weight": 0.0,
        "train__ema_decay": 0.9,
    }
    folder, params = RunFolder(path), tiny.params(tiny.task(**changes))
    write_json(folder.config, tiny.config_dict(**changes).to_dict())
    tiny.tokenizer().save(folder.tokenizer)
    with Checkpoints(folder.checkpoints) as checkpoints:
        state = {"params": jax.tree.map(jnp.zeros_like, params), "average": params}
        checkpoints.save(7, state, {"step": 7, "tokenizer": folder.tokenizer_digest()})
    return folder.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, the one that the command makes of it, and what it says meanwhile."""
    folder = tmp_path_factory.mktemp("quantize")
    first = write_run(folder / "first", tiny.write_coco(folder / "coco"), folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(quantize, "say", said.append)
        out = folder / "deep" / "int8"
        assert run("--run", first, "--out", out, "--activations=int8", "--max_images", "6") == 0
    return first, out, said


def leaves(params):
    return {path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def assert_equal_trees(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def test_scores_before_and_after_are_said_and_kept(runs, capsys):
    first, out, said = runs
    result = read_json(out / "result.json")
    assert json.loads(said[-1]) == result
    assert result["split"] == "val" and result["images"] == 6 and result["steps"] == 7
    assert result["scores"].keys() == result["before"].keys() >= {"caption/cider_d"}
    assert result["versions"]["qwix"] and result["quantized"]["from"] == str(first)
    rows = {line.split()[0]: line.split()[1:] for line in said[-3].splitlines()}
    for name, before in result["before"].items():
        after = result["scores"][name]
        assert rows[name] == [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    before, after = (result["weights"][which]["all"] for which in ("before", "after"))
    assert f"weights: {before:,} bytes before, {after:,} after" in said[-3]
    small, whole = unified_mm.load(out), unified_mm.load(first)
    assert before == sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    assert after == sum(leaf.nbytes for leaf in jax.tree.leaves(small.params)) < before / 2


def test_the_run_holds_int8_and_loads_as_it_was_made(runs):
    first, out, _ = runs
    model, small = unified_mm.load(first), unified_mm.load(out)
    made = quantized(model, activations="int8", source=str(first))
    assert_equal_trees(small.params, made.params)
    assert jax.tree.structure(small.params) == jax.tree.structure(made.params)
    assert small.step == 7 and small.config.as_dict() == made.config.as_dict()
    assert (out / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert out.stat().st_mode & 0o777 == 0o755 and not list(out.parent.glob(".*"))
    np.testing.assert_array_equal(small.embed_texts(TEXTS), made.embed_texts(TEXTS))


@pytest.mark.slow
def test_it_lies_on_a_mesh_as_floats_do(runs):
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    spread = unified_mm.load(runs[1], mesh=mesh)
    up = spread.params["transformer"]["layers"]["block_0"]["feed_forward"]["mlp"]["shared"]["up"]
    assert up["kernel"].values.sharding.shard_shape((2, 16, 32)) == (2, 16, 16)
    assert up["kernel"].scale.sharding.shard_shape((2, 1, 32)) == (2, 1, 16)
    np.testing.assert_allclose(
        spread.embed_texts(TEXTS), unified_mm.load(runs[1]).embed_texts(TEXTS), atol=2e-2
    )


def test_the_main_command_captions_and_evaluates(runs, tmp_path, capsys):
    _, out, _ = runs
    pictures = sorted((out.parents[1] / "coco" / "images" / "val").glob("*.jpg"))[:2]
    images = [f"--image={picture}" for picture in pictures]
    assert commands.run("--mode=caption", f"--workdir={out}", *images) == 0
    said = capsys.readouterr().out
    assert all(f"{picture}: " in said for picture in pictures)
    file = tmp_path / "scores.json"
    coco = "--config=configs/coco.py:tiny", "--config.evaluation.max_images=6"
    assert commands.run("--mode=evaluate", f"--workdir={out}", f"--output={file}", *coco) == 0
    assert read_json(file)["scores"] == read_json(out / "result.json")["scores"]


def test_training_goes_on_with_floats_alone(runs, capsys):
    first, out, _ = runs
    assert commands.run("--config=configs/coco.py:tiny", f"--workdir={out}") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out} holds int8 weights, which cannot be trained")
    assert error.count("\n") == 1 and f"train the run that they were made from ({first})" in error
    started = part_of_run(str(out), "text")
    assert all(np.issubdtype(leaf.dtype, np.floating) for leaf in started.values())
    for path, leaf in part_of_run(str(first), "text").items():
        assert np.abs(started[path] - leaf).max() <= np.abs(leaf).max() / 250


@pytest.mark.slow
def test_weights_are_written_for_others_as_floats(tmp_path, capsys):
    """A published GPT-2, which is text alone: imported, quantised, written and read again."""
    data = tiny.write_coco(tmp_path / "coco")
    theirs = published.write(tmp_path / "theirs")
    with pytest.raises(SystemExit):
        import_weights.main(["--from", str(theirs), "--out", str(tmp_path / "first")])
    made = ("--run", tmp_path / "first", "--out", tmp_path / "int8", "--data_dir", data)
    assert run(*made, "--max_images=4") == 0
    assert "caption/nats" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export_weights.main(["--run", str(tmp_path / "int8"), "--out", str(tmp_path / "again")])
    assert "family: GPT-2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        import_weights.main(["--from", str(tmp_path / "again"), "--out", str(tmp_path / "back")])
    floats = dequantized(unified_mm.load(tmp_path / "int8").params)
    assert_equal_trees(unified_mm.load(tmp_path / "back").params, floats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--out": "FIRST"}, "exists and is not overwritten"),
        ({"--run": "nowhere"}, "nowhere is no run"),
        ({"--run": "INT8"}, "weights are int8 already: quantise the run that they were made from"),
        ({"--split": "nope"}, "evaluation.split='nope' is not in"),
        ({"--max_images": "-1"}, "--max_images: -1 must be at least 1"),
        ({"--data_dir": "nowhere"}, "nowhere"),
        (None, "qwix is not installed"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    runs, tmp_path, capsys, monkeypatch, change, message
):
    first, out, _ = runs
    if change is None:
        monkeypatch.setitem(sys.modules, "qwix", None)
    given = {"--run": first, "--out": tmp_path / "new", **(change or {})}
    named = {"FIRST": first, "INT8": out}
    arguments = [part for flag, value in given.items() for part in (flag, named.get(value, value))]
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_writing_fails(runs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is full")

    small = unified_mm.load(runs[1])
    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(OSError, match="the disk is full"):
        quantize.write_run(small, RunFolder(runs[0]), tmp_path / "new", {})
    assert not list(tmp_path.iterdir())
