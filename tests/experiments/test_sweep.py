"""Sweeps: what is missing is run, once; failures stay alone; a stop is clean. Real processes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import sweeps

from experiments import sweep as command
from experiments.sweeping import local, loop
from experiments.sweeping.ablation import load_ablation
from experiments.sweeping.progress import Progress, duration, newest_records
from experiments.sweeping.runs import asked_config, runs_of
from experiments.sweeping.table import Row, Table
from unified_mm.costs.memory_share import NAMES
from unified_mm.runs.folder import RunFolder


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "python_command", sweeps.stand_in_command)
    return sweeps.write_ablation(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "rates"


def carry_out(ablation, tmp_path, *more):
    arguments = [str(ablation), f"--runs={tmp_path / 'runs'}", "--interval=0.02", *more]
    return command.sweep(command.parse(arguments))


TABLE = """
run     state      caption/nats
low-0   finished         1.0000
high-0  finished         2.0000
low-1   finished         2.0000
high-1  finished         3.0000
"""


def test_all_runs_and_none_again(ablation, tmp_path, folder, capfd):
    assert carry_out(ablation, tmp_path, "--jobs=2") == 0
    first = capfd.readouterr().out
    assert first.startswith("4 runs, 0 finished already") and first.endswith(TABLE)
    assert sum(line.startswith("high-1  running") for line in first.splitlines()) >= 1
    assert carry_out(ablation, tmp_path) == 0
    again = capfd.readouterr().out
    assert again.startswith("4 runs, 4 finished already") and again.endswith(TABLE)
    assert [sweeps.starts(each) for each in sorted(folder.glob("*-[01]"))] == [[0]] * 4


def test_a_training_that_another_sweep_has_done_is_linked(ablation, tmp_path, folder, capfd):
    assert carry_out(ablation, tmp_path, "--only=low") == 0
    other = tmp_path / "other.py"
    other.write_text(ablation.read_text().replace('"low"', '"base"'))
    capfd.readouterr()
    assert carry_out(other, tmp_path) == 0
    said = capfd.readouterr().out
    assert said.startswith("base-0 is the same training as rates/low-0")
    assert "base-0  finished         1.0000" in said
    there = tmp_path / "runs" / "other"
    assert (there / "base-1").resolve() == (folder / "low-1").resolve()
    assert sweeps.starts(folder / "low-0") == [0] and not (there / "high-0").is_symlink()


def test_a_link_to_a_run_that_was_removed_is_replaced(ablation, tmp_path, folder, capfd):
    other = tmp_path / "other.py"
    other.write_text(ablation.read_text())
    assert carry_out(ablation, tmp_path, "--only=low") == 0
    assert carry_out(other, tmp_path, "--only=low") == 0
    shutil.rmtree(folder)
    assert carry_out(other, tmp_path, "--only=low") == 0
    assert not (tmp_path / "runs" / "other" / "low-0").is_symlink()


def test_a_damaged_run_of_another_sweep_is_passed_over(ablation, tmp_path, folder, capfd):
    assert carry_out(ablation, tmp_path, "--only=low", "--seeds=0") == 0
    (folder / "low-0" / "config.json").write_text("{")
    assert carry_out(ablation, tmp_path, "--name=other", "--seeds=0") == 0
    assert "passed over: " in capfd.readouterr().out


def test_a_damaged_result_is_said_and_the_others_stay(ablation, tmp_path, folder, capfd):
    assert carry_out(ablation, tmp_path) == 0
    for content in ("garbage", "[]", "{}", '{"scores": {"caption/nats": null}}'):
        (folder / "low-0" / "result.json").write_text(content)
        capfd.readouterr()
        assert carry_out(ablation, tmp_path) == 1
        said = capfd.readouterr().out
        assert "low-0   differs\n" in said and "high-1  finished         3.0000" in said
        assert "delete it, and the same command scores the run again" in said
        assert carry_out(ablation, tmp_path, "--name=other", "--seeds=0", "--only=low") == 0
        assert not (tmp_path / "runs" / "other" / "low-0").is_symlink()
        shutil.rmtree(tmp_path / "runs" / "other")


def test_a_folder_of_something_else_stops_no_other_run(ablation, tmp_path, folder, capfd):
    (folder / "low-0").mkdir(parents=True)
    (folder / "low-0" / "notes.txt").write_text("mine")
    assert carry_out(ablation, tmp_path) == 1
    said = capfd.readouterr().out
    assert "low-0 differs: " in said and "notes.txt" in said
    assert said.count("finished  ") >= 3


def test_a_run_on_other_data_is_another_run(ablation, tmp_path, capfd):
    more = ("--only=low", "--seeds=0", "--config.data.source=coco")
    assert carry_out(ablation, tmp_path, *more, "--config.data.dir=/a") == 0
    assert carry_out(ablation, tmp_path, *more, "--config.data.dir=/b") == 1
    assert "holds another run: data.dir" in capfd.readouterr().out


def test_a_run_on_data_in_this_folder_says_where_that_is(ablation, tmp_path, monkeypatch):
    """As the run itself does, so that it is the same one when the sweep is begun again."""
    monkeypatch.chdir(tmp_path)
    _, asked = load_ablation(str(ablation))
    (run, *_) = runs_of(asked, tmp_path, more=("--config.data.dir=mine",))
    assert asked_config(run)["data"]["dir"] == str(tmp_path / "mine")


def test_no_run_is_left_alone_whatever_goes_wrong(ablation, tmp_path, folder, capfd, monkeypatch):
    folder.mkdir(parents=True)
    (folder / "low-0.slow").touch()

    def broken(run_folder):
        if (run_folder.path / "starts").exists():
            raise OSError("the disk is gone")
        return Progress()

    monkeypatch.setattr(loop, "progress_of", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        carry_out(ablation, tmp_path, "--jobs=2")
    assert "saved and ended" in capfd.readouterr().out
    for name in ("low-0", "high-0"):
        with RunFolder(folder / name).lock():
            pass


def test_a_signal_while_jobs_start_waits_until_they_are_known():
    before = signal.getsignal(signal.SIGTERM)
    with loop.signals_told() as wait:
        wait(0)  # nothing has come
        os.kill(os.getpid(), signal.SIGTERM)
        reached = True
        assert signal.getsignal(signal.SIGTERM) == before  # a second one acts as it did
        with pytest.raises(loop.SweepStopped) as stopped:
            wait(60)
    assert reached and stopped.value.exit_code == 128 + signal.SIGTERM


def test_a_signal_ends_a_wait_at_once():
    began = time.monotonic()
    with loop.signals_told() as wait, pytest.raises(loop.SweepStopped):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        wait(60)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus=2"], "--gpus is read by --launcher=slurm alone"),
        (["--launcher=slurm", "--tpu=v5e:4x4"], "--tpu is read by --launcher=print alone"),
        (["--trials=2", "--only=low"], "not read beside --trials"),
        (["--trials=2", "--launcher=print"], "--trials goes with --launcher=local"),
    ],
)
def test_what_nothing_would_read_is_refused(ablation, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        carry_out(ablation, tmp_path, *options)
    assert not (tmp_path / "runs").exists()


def test_a_training_that_differs_in_any_field_is_done_itself(ablation, tmp_path, folder):
    """Also in one that may change within a run, such as how often it is saved."""
    assert carry_out(ablation, tmp_path, "--only=low", "--seeds=0") == 0
    more = ("--name=other", "--config.checkpoint.keep=1", "--only=low", "--seeds=0")
    assert carry_out(ablation, tmp_path, *more) == 0
    assert not (tmp_path / "runs" / "other" / "low-0").is_symlink()


def test_jobs_divide_cores_and_gpus():
    shares = [local.share_of(range(5), place, 2) for place in range(2)]
    assert sorted(sum(shares, [])) == list(range(5)) and len(shares[1]) == 2
    assert [local.share_of([7, 8], place, 3) for place in range(3)] == [[7], [8], [7]]
    assert local.share_of_gpus({}, ["2", "5"], 1, 2) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert local.share_of_gpus({}, [], 1, 2) == {} == local.share_of_gpus({}, ["2", "5"], 0, 1)
    three = local.share_of_gpus({}, ["2", "5"], 2, 3)
    assert three == {"CUDA_VISIBLE_DEVICES": "2", "XLA_CLIENT_MEM_FRACTION": "0.375"}
    for name in NAMES:
        assert local.share_of_gpus({name: "0.2"}, ["2"], 1, 2) == {"CUDA_VISIBLE_DEVICES": "2"}


def test_gpus_are_those_that_are_listed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert local.visible_gpus() == ["4", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_gpus() == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux places processes")
def test_a_job_runs_on_its_own_cores(ablation, tmp_path, folder, monkeypatch):
    own = sorted(os.sched_getaffinity(0))
    given = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: given.append(cores))
    assert carry_out(ablation, tmp_path, "--jobs=2") == 0
    assert {tuple(cores) for cores in given} == {tuple(own[0::2]), tuple(own[1 % len(own) :: 2])}


def test_a_failed_run_is_said_and_the_others_go_on(ablation, tmp_path, folder, capfd):
    folder.mkdir(parents=True)
    (folder / "high-0.fails").touch()
    assert carry_out(ablation, tmp_path) == 1
    said = capfd.readouterr().out
    assert "high-0 failed: exit code 1\n  | first words\n  | the loss is on fire" in said
    assert said.partition("caption/nats")[2].count("finished") == 3
    (folder / "high-0.fails").unlink()
    assert carry_out(ablation, tmp_path) == 0
    assert capfd.readouterr().out.endswith(TABLE)
    assert sweeps.starts(folder / "high-0") == [0, 5]


def test_another_run_in_the_place_is_said_and_left(ablation, tmp_path, folder, capfd):
    assert carry_out(ablation, tmp_path, "--only=low", "--seeds=0") == 0
    path = folder / "low-0" / "config.json"
    config = json.loads(path.read_text())
    for group, field, value in (("train", "b2", 0.5), ("train", "steps", 5)):
        path.write_text(json.dumps(config | {group: config[group] | {field: value}}))
        assert carry_out(ablation, tmp_path, "--only=low", "--seeds=0") == 1
        said = capfd.readouterr().out
        assert f"low-0 holds another run: {group}.{field}: run has {value}" in said
    assert sweeps.starts(folder / "low-0") == [0]


def test_sigterm_saves_what_is_at_work_and_the_next_sweep_goes_on(
    ablation, tmp_path, folder, capfd
):
    folder.mkdir(parents=True)
    (folder / "high-0.slow").touch()

    def stop_half_way():
        metrics = folder / "high-0" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_half_way, daemon=True).start()
    assert carry_out(ablation, tmp_path) == 128 + signal.SIGTERM
    assert "saved and ended; the same command goes on" in capfd.readouterr().out
    (folder / "high-0.slow").unlink()
    assert carry_out(ablation, tmp_path) == 0
    assert capfd.readouterr().out.endswith(TABLE)
    assert sweeps.starts(folder / "low-0") == [0]
    started = sweeps.starts(folder / "high-0")
    assert len(started) == 2 and 3 <= started[1] < 10
    assert not (folder / "low-1").exists() or sweeps.starts(folder / "low-1") == [0]


def test_a_run_that_another_process_is_at_work_on_is_waited_for(ablation, tmp_path, folder, capfd):
    """As a sweep that was killed leaves it: its processes live on."""
    from experiments.sweeping.ablation import load_ablation
    from experiments.sweeping.runs import runs_of

    run = runs_of(load_ablation(str(ablation))[1], folder)[0]
    folder.mkdir(parents=True)
    (folder / "low-0.slow").touch()
    other = subprocess.Popen(sweeps.stand_in_command(run), env=local.environment())
    while not run.folder.metrics.exists():
        time.sleep(0.01)
    assert carry_out(ablation, tmp_path, "--only=low", "--seeds=0") == 0
    assert other.wait(10) == 0
    assert sweeps.starts(folder / "low-0") == [0]
    assert "low-0  finished" in capfd.readouterr().out


def test_one_sweep_at_a_time(ablation, tmp_path, folder):
    folder.mkdir(parents=True)
    hold = (
        "import pathlib, sys, time; from unified_mm.files import hold\n"
        "with hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", hold, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=local.environment()) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"process {other.pid} is at work on"):
            carry_out(ablation, tmp_path)
        other.kill()


def test_what_is_asked_is_what_the_command_would_begin_with(ablation, tmp_path):
    from experiments.sweeping.ablation import load_ablation
    from experiments.sweeping.runs import runs_of

    fields = ["--config.model.budget=2e8", "--config.data.crop_scale=(0.9, 1.0)"]
    run = runs_of(load_ablation(str(ablation))[1], tmp_path, more=fields)[-1]
    asked = asked_config(run)
    assert asked["seed"] == 1 and asked["train"]["learning_rate"] == 0.002
    assert asked["data"]["crop_scale"] == [0.9, 1.0]
    assert asked["model"]["width"] != 128  # as wide as the budget allows


def test_print_says_commands_that_a_shell_takes(ablation, tmp_path, capsys):
    assert carry_out(ablation, tmp_path, "--launcher=print", "--config.data.cache_dir=/a b") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("python -m unified_mm.main --config=configs/coco.py:tiny ")
    assert "'--config.data.cache_dir=/a b'" in lines[0]
    assert not (tmp_path / "runs").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_table_is_drawn_in_place(ablation, tmp_path):
    from experiments.sweeping.ablation import load_ablation
    from experiments.sweeping.runs import runs_of

    rows = [Row(run) for run in runs_of(load_ablation(str(ablation))[1], tmp_path)]
    table = Table(6, Terminal())
    table.show(rows)
    rows[0].state, rows[0].progress = "running", Progress(5, 20, 1.25, 0.1)
    table.show(rows)
    rows[1].state, rows[1].said = "failed", "exit code 1\n  | last\n  | words"
    table.show(rows)
    first, second, third = table.stream.getvalue().split("\x1b[5A")  # up to the first line each
    assert third.count("\n") == 5 and "failed" in third
    assert "low-0   waiting" in first and "4 waiting" in first
    assert "low-0   running          5/20    1.250  02:30" in second
    assert "1 running, 3 waiting" in second


def test_progress_reads_what_a_kill_leaves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert newest_records(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    path.write_text('5\n[]\n{"loss": 1}\n{"step": 1, "loss": "x"}\n{"step": 2, "loss": 1.5}\n')
    assert newest_records(path) == [{"step": 2, "loss": 1.5}]
    assert [duration(s) for s in (None, 4.4, 200, 3900)] == ["", "00:04", "03:20", "1:05:00"]
