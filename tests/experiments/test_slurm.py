"""Sweeps by Slurm, submitit's own scripts carried out by a stand-in for its commands."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweeps

from experiments import sweep as command
from experiments.sweeping import slurm
from experiments.sweeping.ablation import load_ablation
from experiments.sweeping.loop import begin, first_rows, look
from experiments.sweeping.runs import runs_of

COMMANDS = ("sbatch", "srun", "sacct", "squeue", "scontrol", "scancel")
STAND_IN = Path(sweeps.__file__).with_name("slurm_stand_in.py")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The state of a cluster whose commands are on the path."""
    home, commands = tmp_path / "cluster", tmp_path / "bin"
    home.mkdir()
    commands.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} {name} "$@"\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(home))
    paths = [str(sweeps.ROOT), str(sweeps.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(slurm, "python_command", sweeps.stand_in_command)
    pytest.importorskip("submitit")
    cloudpickle = pytest.importorskip("cloudpickle")
    monkeypatch.setattr(slurm, "EVERY", 0.3)
    # A job's own code travels with it: to import it, and all that it imports, takes a second.
    cloudpickle.register_pickle_by_value(slurm)
    yield home
    with contextlib.suppress(ValueError):
        cloudpickle.unregister_pickle_by_value(slurm)
    for daemon in home.glob("daemon_*"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(daemon.name.removeprefix("daemon_")), signal.SIGKILL)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "runs" / "rates"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def two_runs(tmp_path):
    """An ablation of low-0 and high-0 alone."""
    return sweeps.write_ablation(tmp_path, sweeps.FILE.replace("seeds=(0, 1)", "seeds=(0,)"))


def carry_out(tmp_path, ablation, *more):
    options = ["--launcher=slurm", f"--runs={tmp_path / 'runs'}", "--interval=0.05", *more]
    return command.sweep(command.parse([str(ablation), *options]))


def tasks(cluster):
    """State and count of starts of each task."""
    found = {path.stem: json.loads(path.read_text()) for path in cluster.glob("1*.json")}
    return {name: (task["state"], task["starts"]) for name, task in sorted(found.items())}


def launcher(folder):
    return slurm.Slurm(folder / "slurm", parallel=0, partition="", minutes=30, gpus=0, cpus=1)


def begun(ablation, folder, started):
    """Rows of a sweep that has submitted its runs, their jobs, one of them some steps along."""
    rows, jobs = first_rows(runs_of(load_ablation(str(ablation))[1], folder)), {}
    begin(rows, launcher(folder), jobs)
    metrics = folder / started / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    return rows, jobs


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_one_array_of_what_is_missing(cluster, tmp_path, folder, capfd):
    ablation = sweeps.write_ablation(tmp_path)
    (folder / "high-0.fails").touch()
    more = ["--jobs=2", "--partition=gpu", "--time=240", "--gpus=4", "--cpus=6"]
    assert carry_out(tmp_path, ablation, *more) == 1
    options = json.loads((cluster / "options.json").read_text())
    assert {key: options[key] for key in ("array", "partition", "time", "gpus-per-node")} == {
        "array": "0-3%2",
        "partition": "gpu",
        "time": "240",
        "gpus-per-node": "4",
    }
    assert options["signal"] == "USR2@300" and options["cpus-per-task"] == "6"
    assert "#SBATCH --requeue" in (cluster / "100.sh").read_text()
    said = capfd.readouterr().out
    assert "high-0 failed: exit code 1\n  | Slurm says FAILED" in said
    assert tasks(cluster)["100_1"] == ("FAILED", 1)
    (folder / "high-0.fails").unlink()
    sys.modules["cloudpickle"].unregister_pickle_by_value(slurm)  # this job imports its code
    assert carry_out(tmp_path, ablation) == 0
    assert set(tasks(cluster)) == {"100_0", "100_1", "100_2", "100_3", "101"}
    assert sweeps.starts(folder / "low-0") == [0]
    assert sweeps.starts(folder / "high-0") == [0, 5]


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_goes_on(cluster, two_runs, folder):
    (folder / "low-0.slow").touch()
    rows, jobs = begun(two_runs, folder, "low-0")
    subprocess.run(["scancel", "--preempt", "100_0"], check=True)
    wait_until(lambda: tasks(cluster)["100_0"][1] == 2)
    (folder / "low-0.slow").unlink()

    def ended():
        for row in rows:
            if row.run.name in jobs:
                look(row, jobs[row.run.name], jobs)
        return not jobs

    wait_until(ended)
    assert [row.state for row in rows] == ["finished"] * 2
    assert tasks(cluster)["100_0"] == ("COMPLETED", 2)
    first, second = sweeps.starts(folder / "low-0")
    assert first == 0 and 3 <= second < 10


def test_without_slurm_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no sbatch on the path"):
        carry_out(tmp_path, sweeps.write_ablation(tmp_path))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_job_that_slurm_has_forgotten_is_no_job(cluster, two_runs, folder):
    rows, jobs = begun(two_runs, folder, "low-0")
    wait_until(lambda: {state for state, _ in tasks(cluster).values()} == {"COMPLETED"})
    for path in cluster.glob("100_*.json"):
        path.unlink()
    shutil.rmtree(folder / "high-0")

    def ended():
        for row in rows:
            if row.run.name in jobs:
                jobs[row.run.name].watcher.info.clear()
                look(row, jobs[row.run.name], jobs)
        return not jobs

    wait_until(ended)
    assert [row.state for row in rows] == ["finished", "failed"]
    assert "Slurm says FORGOTTEN" in rows[-1].said


@pytest.mark.slow
def test_a_sweep_that_starts_again_submits_nothing_twice(
    cluster, tmp_path, two_runs, folder, capfd
):
    (folder / "low-0.slow").touch()
    begun(two_runs, folder, "low-0")  # and that sweep is gone
    assert carry_out(tmp_path, two_runs) == 0
    assert set(tasks(cluster)) == {"100_0", "100_1"}
    assert "low-0" in capfd.readouterr().out
    assert [sweeps.starts(each) for each in sorted(folder.glob("*-0"))] == [[0]] * 2
