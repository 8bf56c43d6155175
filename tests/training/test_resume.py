"""Runs that are killed, terminated or damaged go on as if nothing had been: real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import commands
import jax
import numpy as np
import pytest
import tiny
from processes import ROOT, started

import unified_mm

pytestmark = pytest.mark.slow

STEPS = 400
LIMIT = 900  # seconds that any process may take


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One CPU device; compiled programs kept between the processes of one test."""
    cleared = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {
        **cleared,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "UNIFIED_MM_CACHE": str(tmp_path_factory.mktemp("cache")),
    }


def command(data, workdir, *more):
    return [
        sys.executable,
        "-m",
        "unified_mm.main",
        f"--config={ROOT / 'configs' / 'coco.py'}:tiny",
        *commands.SMALL,
        f"--config.data.dir={data}",
        f"--workdir={workdir}",
        f"--config.train.steps={STEPS}",
        "--config.checkpoint.every=10",
        "--config.logging.every=10",
        "--config.logging.tensorboard=False",
        "--config.train.ema_decay=0.9",
        "--config.train.ema_warmup=True",
        "--config.model.dropout=0.1",
        "--config.objectives.matching.weight=1.0",
        *more,
    ]


def finish(environment, *args):
    done = subprocess.run(
        args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    return done.returncode, done.stdout + done.stderr


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def lines_of_metrics(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, process):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run saved nothing in time"
        time.sleep(0.01)


def outcome(workdir):
    """Parameters at the end, and all metrics but those of the clock."""
    text = (workdir / "metrics.jsonl").read_text()
    lines = [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in text.splitlines()
    ]
    model = unified_mm.load(workdir)
    assert model.step == STEPS
    return jax.tree.map(np.asarray, model.params), lines


@pytest.fixture(scope="module")
def undisturbed(data, environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, said = finish(environment, *command(data, workdir))
    assert code == 0, said
    return outcome(workdir)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
    for line, other in zip(found[1], expected[1], strict=True):
        differ = {k: (line.get(k), other.get(k)) for k in line | other}
        differ = {k: pair for k, pair in differ.items() if pair[0] != pair[1]}
        assert not differ, (line["step"], differ)


def test_three_kills_end_in_the_same_bits(data, environment, tmp_path, undisturbed):
    rng = random.Random(5)
    workdir = tmp_path / "killed"
    kills = 0
    while kills < 3:
        before = max(saved_steps(workdir), default=0)
        with started(environment, *command(data, workdir)) as process:
            wait_for(lambda seen=before: max(saved_steps(workdir), default=0) > seen, process)
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
        assert not (workdir / "result.json").exists(), "too fast to be killed: raise STEPS"
        kills += 1
    code, said = finish(environment, *command(data, workdir))
    assert code == 0, said
    assert "resuming at step" in said
    assert_same(outcome(workdir), undisturbed)


def test_sigterm_saves_says_how_to_go_on_and_exits_with_143(
    data, environment, tmp_path, undisturbed
):
    workdir = tmp_path / "stopped"
    args = command(data, workdir, "--config.checkpoint.every=100000")
    with started(environment, *args) as process:
        wait_for(lambda: lines_of_metrics(workdir) > 2, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, said
    assert "run the same command again" in said and "unified_mm.main" in said
    (step,) = saved_steps(workdir)
    assert 0 < step < STEPS and f"stopped at step {step}" in said
    code, said = finish(environment, *args)
    assert code == 0 and f"resuming at step {step} of {STEPS}" in said, said
    params, _ = outcome(workdir)
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])


def test_a_damaged_checkpoint_is_named_and_stepped_over(data, environment, tmp_path, undisturbed):
    workdir = tmp_path / "damaged"
    with started(environment, *command(data, workdir)) as process:
        wait_for(lambda: len(saved_steps(workdir)) >= 2 and saved_steps(workdir)[-1] > 20, process)
        process.send_signal(signal.SIGKILL)
    older, newest = saved_steps(workdir)[-2:]
    files = [p for p in (workdir / "checkpoints" / str(newest)).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, said = finish(environment, *command(data, workdir))
    assert code == 0, said
    assert f"resuming at step {older} of" in said
    assert f"step {newest}" in said and "damaged" in said
    assert_same(outcome(workdir), undisturbed)


def test_two_processes_never_train_one_run(data, environment, tmp_path):
    workdir = tmp_path / "shared"
    with started(environment, *command(data, workdir)) as process:
        wait_for(lambda: saved_steps(workdir), process)
        process.send_signal(signal.SIGSTOP)
        code, said = finish(environment, *command(data, workdir))
    assert code == 1 and f"process {process.pid} is at work" in said
