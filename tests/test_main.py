"""The command as a user types it, on a small folder in COCO layout."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import tiny

import unified_mm
from unified_mm.cli.recipes import load_recipe
from unified_mm.inference.predictor import Predictor
from unified_mm.runs.metrics import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = f"--config={CONFIGS / 'coco.py'}:tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIFIED_MM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Of most runs here, so that they share their programs.
BEST_BY = "single_caption/text_to_image/recall_at_1"
ALIKE = (
    "--config.objectives.matching.weight=1.0",
    "--config.evaluation.every=2",
    "--config.logging.every=1",
    "--config.logging.tensorboard=True",
    "--config.logging.peak_flops=1e9",
)


def train(data, workdir, *more, config=TINY):
    return commands.run(
        config, *commands.SMALL, f"--config.data.dir={data}", f"--workdir={workdir}", *more
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of four steps with every objective and evaluations on the way.

    The evaluations on the way and the one at the end share what is compiled.
    """
    folder, traced, call = tmp_path_factory.mktemp("runs") / "first", [], Predictor.call

    def counted(self, name, function, *args, **options):
        def noted(*given):
            traced.append(name)
            return function(*given)

        return call(self, name, noted, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "call", counted)
        assert train(data, folder, *ALIKE, "--profile=1") == 0
    assert {"embed image contrastive", "embed text contrastive", "log_likelihood"} < set(traced)
    assert len(traced) == len(set(traced)), traced
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """The finished run as it was after two steps."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "4")
    return run


def test_a_run_is_a_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.json",
        "tokenizer.json",
        "checkpoints",
        "best",
        "metrics.jsonl",
        "tensorboard",
        "result.json",
        "report.html",
    }
    result = json.loads((finished / "result.json").read_text())
    assert result["scores"].keys() >= {
        "text_to_image/recall_at_1",
        "text_to_image/median_rank",
        "image_to_text/recall_at_10",
        "single_caption/text_to_image/recall_at_1",
        "caption/cider_d",
        "caption/bleu_4",
        "caption/rouge_l",
    }
    assert result.keys() >= {
        "chance", "ceiling", "data", "device", "versions", "revision", "seed", "seconds", "flops",
        "parameters",
    }  # fmt: skip
    assert result["scores"]["caption/image_gain_low"] <= result["scores"]["caption/image_gain"]
    assert result["data"]["counts"] == {"train": 24, "val": 8}
    captions = json.loads((finished / "captions.json").read_text())
    assert [each["image_id"] for each in captions] == list(range(8))
    assert captions[3]["file_name"] == "images/val/3.jpg" and isinstance(
        captions[3]["caption"], str
    )
    assert not (finished / "answers.json").exists()  # it was not asked
    assert result["flops"] > 0


def test_metrics_hold_every_loss_by_step(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    weights = {"contrastive": 1, "captioning": 4, "matching": 1}
    for line in losses:
        expected = sum(weight * line[f"{name}/loss"] for name, weight in weights.items())
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert [line["step"] for line in lines if "val/caption/cider_d" in line] == [2, 4]
    flops = json.loads((finished / "result.json").read_text())["flops"] / 4
    timed = [line for line in losses if "time/steps_per_second" in line]
    assert timed and all(
        line["time/mfu"] == pytest.approx(line["time/steps_per_second"] * flops / 8e9)
        for line in timed
    )


def test_the_report_asks_nothing_of_the_network(finished):
    page = (finished / "report.html").read_text()
    assert "recall at 1" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", page)


def test_a_traced_run_reports_its_longest_operations(finished, data, capsys):
    told = json.loads((finished / "profile" / "operations.json").read_text())
    assert told["first"] == told["last"] == 4 and len(told["operations"]) == 10
    page = (finished / "report.html").read_text()
    assert "Where the time of a step goes" in page
    assert any("transformer" in each["name"] for each in told["operations"])
    assert train(data, finished, *ALIKE, "--profile=1") == 1
    assert "has no step left" in capsys.readouterr().err


def test_a_finished_run_says_so(finished, data, capsys):
    before = (finished / "result.json").read_bytes()
    assert train(data, finished, *ALIKE) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished / "result.json").read_bytes() == before


def test_another_config_is_refused_with_the_differences(finished, data, capsys):
    assert train(data, finished, "--config.seed=5", "--config.model.dropout=0.1") == 1
    error = capsys.readouterr().err
    assert "seed: run has 0, command asks 5" in error
    assert "model.dropout: run has 0.0, command asks 0.1" in error


def test_evaluate_scores_another_folder(finished, data, tmp_path, capsys):
    output = tmp_path / "scores.json"
    evaluate = ("--mode=evaluate", f"--workdir={finished}", "--split=train", f"--output={output}")
    assert commands.run(*evaluate) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["split"] == "train" and result == json.loads(output.read_text())
    captions = json.loads((tmp_path / "scores_captions.json").read_text())
    assert [each["file_name"] for each in captions] == [f"images/train/{n}.jpg" for n in range(24)]
    output.unlink()
    assert commands.run(*evaluate) == 1
    assert "scores_captions.json exists and is not overwritten" in capsys.readouterr().err
    output.touch()
    assert commands.run(*evaluate) == 1
    assert "not overwritten" in capsys.readouterr().err
    assert commands.run("--mode=evaluate", f"--workdir={finished}", "--split=nope") == 1
    assert "train, val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode=evaluate", "--output=none/new.json"), "there is no folder none"),
        (("--mode=evaluate", "--query=x"), "--query is read by --mode=search, not by"),
        (("--mode=caption", "--split=val"), "--split is read by --mode=evaluate and --mode=search"),
        (("--mode=search", "--query=x", "--images=.", "--split=val"), "--split is not read where"),
        (("--mode=search", "--query= "), "needs --query"),
        (("--mode=search", "--query=x", "--images=~nobody-here"), "names no user"),
        (("--mode=evaluate", TINY, "--config.data.image_size=32"), "data.image_size cannot be"),
        (("--mode=evaluate", TINY, "--config.data.decoder=opencv"), "data.decoder cannot be"),
        (("--mode=evaluate", TINY, "--config.model.width=32"), "model.width cannot be changed"),
        (("--mode=evaluate", TINY, "--config.evaluation.batch_size=0"), "evaluation.batch_size=0"),
        (("--mode=evaluate", TINY, "--config.data.world.seed=1"), "nothing in this run reads"),
        (("--mode=evaluate", TINY, "--config.evaluation.questions=True"), "questions_val.json"),
        (("--mode=caption", TINY, "--config.data.dir=x", "--image=x"), "It can set no field"),
        (("--mode=caption", "--image=x", "stray"), "stray is no flag"),
    ],
)
def test_what_a_mode_does_not_read_is_refused(finished, capsys, arguments, message):
    assert commands.run(f"--workdir={finished}", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_best_state_is_scored_as_it_was_on_the_way(finished, data, tmp_path, capsys):
    best = int(next(path.name for path in (finished / "best").iterdir() if path.name.isdecimal()))
    steps, on_the_way = read_metrics(finished / "metrics.jsonl")[f"val/{BEST_BY}"]
    evaluate = ("--mode=evaluate", f"--run={finished}")
    assert commands.run(*evaluate, "--best") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["state"], result["step"]) == ("best", best)
    assert result["scores"][BEST_BY] == on_the_way[steps == best].item() == on_the_way.max()
    assert commands.run(*evaluate) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["state"], last["step"]) == ("last", 4)
    assert json.loads((finished / "result.json").read_text())["state"] == "last"
    model = unified_mm.load(finished, best=True)
    assert (model.state, model.step) == ("best", best)
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    for command in (("--mode=evaluate",), ("--mode=caption", "--image=x.jpg")):
        assert commands.run(*command, f"--run={tmp_path / 'run'}", "--best") == 1
        assert "has no best state" in (said := capsys.readouterr().err)
        assert "evaluation.every" in said


def test_search_leaves_out_what_it_cannot_read(finished, data, tmp_path, capsys):
    good = (data / "images" / "val" / "0.jpg").read_bytes()
    for name, content in (("a.jpg", good), ("b.jpg", b"no picture")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    search = ("--mode=search", f"--workdir={finished}", "--query=red", f"--images={tmp_path}")
    assert commands.run(*search) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"left out: 1 x not an image of a known format ({tmp_path / 'b.jpg'})"
    assert second.endswith("a.jpg")
    (tmp_path / "a.jpg").unlink()
    assert commands.run(*search) == 1


def test_a_refused_command_leaves_the_run_as_it_was(finished, data, tmp_path, capsys):
    run, other = tmp_path / "run", tiny.write_coco(tmp_path / "other", train=25)
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    before = {path.name: path.read_bytes() for path in run.glob("*.json*")}
    assert train(other, run, *ALIKE) == 1
    assert "is not what this run began with" in capsys.readouterr().err
    assert train(data, run, *ALIKE, "--config.train.steps=2") == 1
    assert "beyond train.steps=2" in capsys.readouterr().err
    (run / "tokenizer.json").write_text(before["tokenizer.json"].decode() + " ")
    assert train(data, run, *ALIKE) == 1
    assert commands.run("--mode=caption", f"--workdir={run}", "--image=x") == 1
    assert capsys.readouterr().err.count("tokenizer.json is not the tokenizer that this run") == 2
    (run / "tokenizer.json").write_bytes(before["tokenizer.json"])
    assert {path.name: path.read_bytes() for path in run.glob("*.json*")} == before


@pytest.fixture(scope="module")
def full(data, tmp_path_factory):
    """The same run as the finished one, whose disk is full at its last step, and what it says."""
    from unified_mm.runs.checkpoints import Checkpoints

    save, folder, said = Checkpoints.save, tmp_path_factory.mktemp("runs") / "full", io.StringIO()

    def full_at_four(self, step, *arguments):
        if step == 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: write: No space left on device")
        save(self, step, *arguments)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(Checkpoints, "save", full_at_four)
        assert train(data, folder, *ALIKE) == 1
    return folder, said.getvalue()


def test_a_full_disk_is_said_with_the_last_whole_checkpoint(full):
    _, error = full
    assert "no space left on device" in error and "the last whole checkpoint is step 2" in error


def test_nothing_that_is_only_nice_to_know_ends_a_run(stopped, data, tmp_path, monkeypatch, capsys):
    """A git that hangs, a picture that is gone, FLOPs that cannot be counted, no TensorBoard."""

    def fails(*_, **__):
        raise RuntimeError("it cannot be had")

    (tmp_path / "git").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("unified_mm.runs.environment._GIT_SECONDS", 0.1)
    monkeypatch.setattr("unified_mm.analysis.run_report.picture", fails)
    monkeypatch.setattr("unified_mm.training.run.training_flops", fails)
    monkeypatch.setattr("unified_mm.training.loop.training_flops", fails)
    monkeypatch.setattr("unified_mm.training.loop.peak_of", lambda *_: (1e12, "a peak"))
    shutil.rmtree(stopped / "tensorboard", ignore_errors=True)
    (stopped / "tensorboard").write_text("no folder")
    (stopped / "report.html").unlink(missing_ok=True)
    with pytest.warns(UserWarning) as told:
        assert train(data, stopped, *ALIKE) == 0
    missing = " ".join(str(each.message) for each in told)
    for what in ("the git revision", "its FLOPs", "MFU", "report.html", "TensorBoard's files"):
        assert f"the run goes on without {what}" in missing.replace(f"{stopped}/", "")
    result = json.loads((stopped / "result.json").read_text())
    assert (result["revision"], result["flops"]) == ("", None) and result["scores"]
    lines = map(json.loads, (stopped / "metrics.jsonl").read_text().splitlines())
    assert not any("time/mfu" in line for line in lines if line["step"] > 2)
    assert "report:" not in capsys.readouterr().out
    assert train(data, stopped, *ALIKE) == 0
    said = capsys.readouterr().out
    assert f"is finished; see {stopped / 'result.json'}" in said and "trained on" not in said
    assert train(stopped, stopped, *ALIKE) == 0
    assert f"it was trained on {data}, and this command names {stopped}" in capsys.readouterr().out


def test_two_runs_of_one_seed_have_equal_metrics(finished, full):
    first, second = (untimed(run / "metrics.jsonl") for run in (finished, full[0]))
    last = first.pop()  # the finished run's last scores, which the other did not come to
    assert last["step"] == 4 and "val/caption/cider_d" in last
    assert [line["step"] for line in first] == [1, 2, 2, 3, 4]
    assert first == second


def untimed(path):
    """Each line of metrics, without what was measured by the clock."""
    lines = map(json.loads, path.read_text().splitlines())
    kept = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return [line for line in kept if len(line) > 1]  # which peak MFU is of has a line of its own


def test_caption_and_search(finished, data, capsys):
    images = [str(data / "images" / "val" / f"{i}.jpg") for i in range(2)]
    assert (
        commands.run(
            "--mode=caption", f"--workdir={finished}", *(f"--image={path}" for path in images)
        )
        == 0
    )
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == images
    search = ("--mode=search", f"--workdir={finished}", "--query=a red square")
    assert commands.run(*search, f"--images={data / 'images' / 'val'}", "--top=3") == 0
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 3
    values = [float(line.split()[0]) for line in found]
    assert values == sorted(values, reverse=True)
    assert commands.run(*search, f"--images={data / 'annotations'}") == 1
    assert "holds no image" in capsys.readouterr().err


def test_load_gives_the_model(finished, data):
    model = unified_mm.load(finished)
    assert model.step == 4
    path = data / "images" / "val" / "0.jpg"
    vectors = model.embed_images([path, path])
    assert vectors.shape == (2, 128) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(model.embed_texts(["a red cube left of a ball"]), axis=1), 1, rtol=1e-5
    )
    assert isinstance(model.caption([path])[0], str)
    assert {"transformer", "embedders_image", "embedders_text"} <= model.params.keys()


def test_a_budget_settles_the_width_and_is_no_field_that_nothing_reads(data, tmp_path, monkeypatch):
    from unified_mm.training import run
    from unified_mm.training.loop import Stopped

    def stop(setup, output, *, traced):
        raise Stopped(0, 75)

    monkeypatch.setattr(run, "train_and_score", stop)  # all before the first step is done
    flags = ["--config.model.budget=1.2e6", "--config.model.budget_by=width"]
    flags += ["--config.objectives.captioning.weight=0.0"]
    assert train(data, tmp_path / "run", *flags) == 75
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["width"] > 16  # that of SMALL, a fraction of the budget


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.dirr=x", "did you mean data.dir"),
        ("--config.model.moddalities.image.patch=4", "did you mean model.modalities.image.patch"),
        ("--config.objectives.matching.rule=joint", "nothing in this run reads it"),
        ("--config.model.budget_by=layers", "nothing in this run reads it"),
        ("--config.model.fusion=sideways", "early"),
        ("--config.objectives.captioning.rule=joint", "would see the one it must predict"),
        ("--config.train.batch_size=7", "train.batch_size=7"),
        ("--config.mesh.tensor=3", "mesh.tensor=3"),
        ("--config.model.modalities.image.patch=12", "no multiple"),
        ("--config.model.modalities.image.patch=6", "hierarchical stem"),
        ("--config.evaluation.split=nope", "train, val"),
        ("--config.evaluation.questions=True", "questions_val.json"),
        ("--config.data.question_share=0.5", "questions_train.json"),
        ("--config.seed=-1", "seed=-1: must be"),
        ("--config.seed=99999999999999999999", "seed=99999999999999999999: must be"),
        ("--config.train.steps=many", "many"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(data, tmp_path, capsys, flag, message):
    assert train(data, tmp_path / "run", flag) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_wrong_data_folder_is_an_error_and_never_the_world(tmp_path, capsys):
    assert train(tmp_path / "nothing", tmp_path / "run") == 1
    said = capsys.readouterr()
    assert str(tmp_path / "nothing") in said.err and "world" not in said.out


@pytest.mark.parametrize(
    "arguments", [("--workdir=x",), (TINY,), ("--config=none.py",), ("--config.seed=3",)]
)
def test_what_is_missing_is_named(arguments, capsys):
    assert commands.run(*arguments) == 1
    assert re.search("--config=|--workdir=|none.py", capsys.readouterr().err)


def flag_forms(value):
    return (f"--config={value}",), ("--config", value)


@pytest.mark.parametrize("form", range(2))
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.py", None, "no such file"),
        ("README.md", "Some text (of mine)", "not a Python file, line 1"),
        ("setup.py", "raise SystemExit('it was run')", "defines no get_config"),
        ("bytes.py", b"\0\xff", "not a Python file"),
        ("recipe.txt", "def get_config(): ...", "ends in .py"),
        ("nothing.py", "def get_config(): return {}", "returns a dict"),
        ("sizes.py:huge", "def get_config(): return {}", "has no sizes"),
    ],
)
def test_what_is_no_recipe_is_not_run(tmp_path, capsys, form, name, content, message):
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name.partition(":")[0]).write_bytes(content)
    assert commands.run(*flag_forms(str(tmp_path / name))[form], "--workdir=x") == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("form", range(2))
def test_an_unknown_size_or_field_is_said_in_one_line(capsys, form):
    given = flag_forms(TINY.removeprefix("--config=").replace(":tiny", ":huge"))[form]
    assert commands.run(*given, "--workdir=x") == 1
    assert "no size 'huge'" in capsys.readouterr().err
    given = flag_forms(TINY.removeprefix("--config="))[form]
    for wrong in (("--config.trian", "3"), ("-config.trian=3",), ("--nope=3",), ("--mode=nope",)):
        assert commands.run(*given, *wrong, "--workdir=x") == 1
        error = capsys.readouterr().err
        assert wrong[0].strip("-").split("=")[0] in error and len(error.splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_the_run(data, stopped, monkeypatch, capsys):
    from unified_mm.training import loop

    restored = loop.first_state

    def damaged(*arguments):
        state, *rest = restored(*arguments)
        nothing = [np.full(x.shape, np.nan, x.dtype) for x in jax.tree.leaves(state.params)]
        params = jax.tree.unflatten(jax.tree.structure(state.params), nothing)
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        return state.replace(params=jax.device_put(params, shardings)), *rest

    monkeypatch.setattr(loop, "first_state", damaged)
    assert train(data, stopped, *ALIKE) == 1
    error = capsys.readouterr().err
    assert "not finite at step 3" in error and "last good checkpoint is step 2" in error
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"2"}
    assert not (stopped / "result.json").exists()


# Shrunk, the sizes of a recipe are nearly one: tests/training/test_ahead.py plans them all. The
# fast suite runs coco (`finished`) and coco_flamingo (tests/training/test_phases.py); that of
# photographs needs weights of others: tests/test_photographs.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("coco", "large"), ("coco_documents", "tiny"), ("coco_experts", "tiny")]
)
def test_a_recipe_shrunk_runs_a_step(name, size, data, tmp_path):
    path = CONFIGS / f"{name}.py"
    recipe = load_recipe(path).get_config(size)
    phases, shots = recipe.train.phases, recipe.evaluation.shots
    more = (
        f"--config.train.steps={max(1, len(phases))}",
        *(f"--config.train.phases.{name}.steps=1" for name in phases),
        "--config.model.modalities.image.patch=8",
    )
    if name == "coco_experts":  # 8 examples on as many devices are no groups of several
        more += ("--config.model.feed_forward_options.group=1",)
    # In how jax itself writes out products of bfloat16, types are widened.
    promotion = "standard" if recipe.model.dtype == "bfloat16" else "strict"
    with jax.numpy_dtype_promotion(promotion):
        assert train(data, tmp_path / "run", *more, config=f"--config={path}:{size}") == 0
    scores = json.loads((tmp_path / "run" / "result.json").read_text())["scores"]
    for number in shots:
        assert 0 <= scores[f"few_shot/{number}/caption/cider_d"] <= 10
