"""One run of two real processes with two devices each: as one process, and what ends it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time

import commands
import pytest
import tiny
from processes import ROOT, started

from unified_mm.runs.seal import is_sealed

pytestmark = pytest.mark.slow

LIMIT = 900  # seconds that any process may take
HEARTBEAT = 10  # seconds after which a silent process counts as dead
STEPS = 10
TWO_DEVICES = "--xla_force_host_platform_device_count=2"
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
ENDLESS = ("--config.train.steps=1000000",)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": TWO_DEVICES,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "UNIFIED_MM_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    data = tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")
    return (
        sys.executable,
        "-m",
        "unified_mm.main",
        f"--config={ROOT / 'configs' / 'coco.py'}:tiny",
        *commands.SMALL,
        "--config.model.layers=1",
        f"--config.data.dir={data}",
        f"--config.train.steps={STEPS}",
        "--config.train.learning_rate=1e-3",
        "--config.mesh.fsdp=4",  # so that each process holds half of every parameter
        "--config.checkpoint.every=5",
        f"--config.evaluation.every={STEPS}",  # at the end alone, and for best/
        "--config.logging.every=1",
        "--config.model.dropout=0.1",
        "--config.train.ema_decay=0.9",
        "--config.logging.tensorboard=True",
    )


@contextlib.contextmanager
def pair(environment, *args):
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = (f"--coordinator=127.0.0.1:{port}", "--processes=2")
    shared = (*args, *place, f"--heartbeat_timeout={HEARTBEAT}")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(started(environment, *shared, f"--process={number}"))
            for number in range(2)
        ]


def finish(processes):
    """Exit code and output of each."""
    said = [process.communicate(timeout=LIMIT)[0] for process in processes]
    return [process.returncode for process in processes], said


def metrics(workdir):
    """Each line without the clock's values."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}


def sealed_steps(workdir):
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(p.name) for p in folders if p.name.isdigit() and is_sealed(p))


def wait_for(condition, processes):
    deadline = time.monotonic() + LIMIT
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run came to nothing in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(environment, command, tmp_path_factory):
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    args = (*command, f"--workdir={workdir}")
    with started(environment | {"XLA_FLAGS": FOUR_DEVICES}, *args) as process:
        codes, said = finish([process])
    assert codes == [0], said[0]
    assert "of 1 process |" in said[0]
    return workdir


@pytest.fixture(scope="module")
def shared(environment, command, tmp_path_factory):
    """The run of two processes with two devices each, and what each said."""
    workdir = tmp_path_factory.mktemp("runs") / "shared"
    with pair(environment, *command, f"--workdir={workdir}") as processes:
        codes, said = finish(processes)
    assert codes == [0, 0], "\n\n".join(said)
    return workdir, said


def test_two_processes_train_and_score_as_one(alone, shared):
    expected, found = metrics(alone), metrics(shared[0])
    assert len(found) == len(expected) == STEPS + 1  # each written once, the last are scores
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    results = [json.loads((run / "result.json").read_text()) for run in (shared[0], alone)]
    assert results[0]["scores"] == pytest.approx(results[1]["scores"], rel=1e-5, abs=1e-5)
    assert results[0]["data"] == results[1]["data"]
    assert results[0]["device"] == results[1]["device"]


def test_one_process_writes_and_speaks(shared):
    workdir, (first, other) = shared
    assert "4 x cpu" in first and "of 2 processes |" in first
    assert "step 10/10" in first and "report: " in first
    assert not [line for line in other.splitlines() if line and "[Gloo]" not in line]
    assert len(list((workdir / "tensorboard").iterdir())) == 2  # of training, of the last scores
    assert sealed_steps(workdir) == [5, 10] and len(list((workdir / "best").iterdir())) == 1


def test_one_process_goes_on_with_another_mesh(environment, command, shared, tmp_path):
    workdir = tmp_path / "taken on"
    shutil.copytree(shared[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "10")
    (workdir / "result.json").unlink()
    args = (*command, f"--workdir={workdir}", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    with started(environment | {"XLA_FLAGS": FOUR_DEVICES}, *args) as process:
        codes, said = finish([process])
    assert codes == [0] and "resuming at step 5 of 10" in said[0], said[0]
    assert losses(workdir) == pytest.approx(losses(shared[0]), rel=1e-5)
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))


def test_a_stop_is_agreed_on_and_a_death_ends_all(environment, command, tmp_path):
    workdir = tmp_path / "run"
    args = (*command, f"--workdir={workdir}", "--config.evaluation.every=0")
    with pair(environment, *args, *ENDLESS) as processes:
        wait_for(lambda: (workdir / "metrics.jsonl").exists() and losses(workdir), processes)
        processes[1].send_signal(signal.SIGTERM)
        codes, said = finish(processes)
    assert codes == [143, 143], "\n\n".join(said)
    stopped = sealed_steps(workdir)[-1]
    assert f"stopped at step {stopped}, which is saved" in said[0]
    assert "stopped" not in said[1]

    with pair(environment, *args, *ENDLESS) as processes:
        wait_for(lambda: sealed_steps(workdir)[-1] > stopped, processes)
        processes[1].kill()
        died = time.monotonic()
        code = processes[0].wait(timeout=LIMIT)
        seconds = time.monotonic() - died
        said = processes[0].stdout.read()
    assert code not in (0, 143) and seconds < 2 * HEARTBEAT + 5, (code, seconds, said)
    assert f"resuming at step {stopped} of" in said
    assert "process 0 of 2 cannot go on" in said or "another task died" in said

    saved = sealed_steps(workdir)[-1]
    with pair(environment, *args, f"--config.train.steps={saved + 3}") as processes:
        codes, said = finish(processes)
    assert codes == [0, 0] and f"resuming at step {saved} of {saved + 3}" in said[0], said
    assert (workdir / "result.json").exists()


def test_a_process_that_never_comes_is_an_error_that_says_what_to_check(environment, tmp_path):
    args = [sys.executable, "-m", "unified_mm.main", f"--workdir={tmp_path / 'run'}"]
    args += [f"--config={ROOT / 'configs' / 'coco.py'}:tiny", "--start_timeout=3"]
    args += ["--coordinator=127.0.0.1:1", "--processes=2", "--process=1"]
    with started(environment, *args) as process:
        codes, said = finish([process])
    assert codes == [1]
    assert "3 seconds (--start_timeout) have passed and not all of 2 processes" in said[0]
    assert "met at 127.0.0.1:1. Check" in said[0]
