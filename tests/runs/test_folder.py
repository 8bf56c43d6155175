"""The run folder: what may share a config, what is written when, and who holds the run."""

import copy
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unified_mm.cli.recipes import load_recipe
from unified_mm.default_config import defaults
from unified_mm.files import read_json, write_json
from unified_mm.runs.folder import (
    ConfigDifference,
    RunFolder,
    RunFolderError,
    RunLocked,
    differences,
)

CONFIG = {
    "seed": 0,
    "train": {"steps": 100, "batch_size": 8, "learning_rate": 1e-3},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "data": {"dir": "/here", "image_size": 64},
    "model": {"fusion": "early", "widths": (1, 2), "causal": True},
    "objectives": {},
    "evaluation": {},
}


def changed(**fields):
    """CONFIG with some fields, named with __ for dots, changed."""
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        *parents, last = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


def names_in(folder):
    return sorted(os.listdir(folder))


def test_a_new_folder_gets_the_config_and_the_same_config_goes_on(tmp_path):
    run = RunFolder(tmp_path / "a" / "first")
    assert not run.exists and not run.finished
    assert run.create_or_check(CONFIG, CONFIG)
    assert run.exists and names_in(run.path) == ["config.json"]
    assert not run.create_or_check(CONFIG, CONFIG)  # tuples come back as lists: no difference
    assert read_json(run.config)["model"]["widths"] == [1, 2]
    write_json(run.result, {"scores": {}})
    assert run.finished


def test_fields_free_to_change_are_taken_over(tmp_path):
    run = RunFolder(tmp_path)
    run.create_or_check(CONFIG, CONFIG)
    asked = changed(train__steps=900, mesh__data=4, mesh__tensor=2, data__dir="/there")
    assert not run.create_or_check(asked, CONFIG)
    assert read_json(run.config) == asked


def test_every_other_difference_is_listed_and_nothing_written(tmp_path):
    run = RunFolder(tmp_path)
    run.create_or_check(CONFIG, CONFIG)
    asked = changed(train__steps=900, train__batch_size=16, model__fusion="late", seed=1)
    with pytest.raises(ConfigDifference) as error:
        run.create_or_check(asked, CONFIG)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert lines == [
        'model.fusion: run has "early", command asks "late"',
        "seed: run has 0, command asks 1",
        "train.batch_size: run has 8, command asks 16",
    ]
    assert "--workdir" in str(error.value)
    assert read_json(run.config)["train"]["steps"] == 100


def test_an_option_of_a_kind_that_came_later_is_no_difference(tmp_path):
    """The run says nothing of it, and a recipe that names all options asks for its default."""
    asked = load_recipe("configs/coco_experts.py").get_config("tiny").to_dict()
    old = copy.deepcopy(asked)
    del old["model"]["feed_forward_options"]["shared"]
    folder = RunFolder(tmp_path / "run")
    assert folder.create_or_check(old, defaults())
    assert "shared" not in folder.read_config(defaults())["model"]["feed_forward_options"]
    assert not folder.check(asked, defaults()) and not folder.check(old, defaults())
    asked["model"]["feed_forward_options"]["shared"] = True
    with pytest.raises(ConfigDifference, match=r"feed_forward_options.shared.*false.*true"):
        folder.check(asked, defaults())


def test_true_is_not_one_but_one_is_one_point_zero():
    assert differences({"a": True}, {"a": 1})
    assert not differences({"a": 1.0}, {"a": 1})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("xyé", max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.sampled_from("abcd"), values, max_size=4)


@given(configs, configs)
def test_differences_are_none_for_equals_and_symmetric(left, right):
    assert differences(left, left) == ()
    one_way = [(d.field, d.run, d.asked) for d in differences(left, right)]
    other_way = [(d.field, d.asked, d.run) for d in differences(right, left)]
    assert one_way == other_way


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter one")
    run = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        run.create_or_check(CONFIG, CONFIG)
    with pytest.raises(RunFolderError, match=r"thesis\.tex"), run.lock():
        pass
    assert names_in(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").create_or_check(CONFIG, CONFIG)


def test_leftovers_of_a_process_killed_in_its_first_moment_are_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("123")
    (tmp_path / ".config.json.x7.tmp").write_text('{"se')
    assert RunFolder(tmp_path).create_or_check(CONFIG, CONFIG)


HOLDER = """
import sys, time
from unified_mm.runs.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_hold_one_run_and_a_kill_frees_it(tmp_path):
    run = RunFolder(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=rf"process {holder.pid} "), run.lock():
            pass
        holder.kill()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_what_the_system_says_of_a_run_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "run", tmp_path / ("x" * 300), "/proc/none"):
        with pytest.raises(RunFolderError, match="--workdir") as error, RunFolder(wrong).lock():
            pass
        assert str(wrong) in str(error.value)
    with pytest.raises(RunFolderError, match="is no UTF-8"):
        RunFolder(os.fsdecode(b"run\xff"))
    with pytest.raises(ValueError, match="~nobody-here.* names no user"):
        RunFolder("~nobody-here/run")


@pytest.mark.parametrize(
    "content", ["[]", "null", '"x"', "", "{", "[" * 10**6, "9" * 5000], ids=lambda text: text[:6]
)
def test_damaged_files_of_a_run_are_named_with_what_to_do(tmp_path, content):
    run = RunFolder(tmp_path)
    run.config.write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.json.*put the run's own config back"):
        run.check(CONFIG, CONFIG)
    run.result.write_text(content)
    with pytest.raises(RunFolderError, match=r"result\.json.*delete it"):
        run.finished_steps()


def test_a_result_says_its_steps(tmp_path):
    run = RunFolder(tmp_path)
    write_json(run.result, {"steps": 4})
    assert run.finished_steps() == 4
    write_json(run.result, {"steps": True})
    with pytest.raises(RunFolderError, match="says no number of steps; delete it"):
        run.finished_steps()


def test_another_tokenizer_than_the_checkpoint_tells_of_is_refused(tmp_path):
    run = RunFolder(tmp_path)
    run.check_tokenizer({"tokenizer": None})
    run.tokenizer.write_text("one")
    known = {"tokenizer": run.tokenizer_digest()}
    run.check_tokenizer(known)
    run.check_tokenizer({"step": 0})
    run.tokenizer.write_text("two")
    with pytest.raises(RunFolderError, match=r"tokenizer\.json is not the tokenizer"):
        run.check_tokenizer(known)
    run.tokenizer.unlink()
    with pytest.raises(RunFolderError, match=r"tokenizer\.json is missing"):
        run.check_tokenizer(known)


def test_the_result_of_a_run_that_is_taken_on_is_set_aside(tmp_path):
    run = RunFolder(tmp_path)
    run.set_result_aside()  # there is none: nothing happens
    run.result.write_text('{"steps": 7}')
    run.set_result_aside()
    assert not run.finished
    assert (tmp_path / "result_7.json").read_text() == '{"steps": 7}'
