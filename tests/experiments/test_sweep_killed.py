"""A sweep and its run killed in the middle, without warning: real training, real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import sweeps
import tiny

pytestmark = pytest.mark.slow

LIMIT = 600  # seconds that any sweep may take
STEPS = 40
FILE = '''"""Which rate? Expected: no difference."""
from experiments.sweeping.ablation import Ablation

COMMON = {
    "data.image_size": 16, "data.vocabulary_size": 300, "model.width": 16, "model.layers": 2,
    "model.unroll": 1, "model.heads": 2, "model.feed_forward": 32,
    "model.modalities.text.length": 12, "train.batch_size": 8, "train.steps": %d,
    "train.warmup_steps": 1, "checkpoint.every": 5, "logging.every": 5,
    "logging.tensorboard": False, "evaluation.batch_size": 8,
}


def get_ablation(size):
    return Ablation(
        config="configs/coco.py:tiny",
        common=COMMON,
        grid={"train.learning_rate": (0.001, 0.002)},
        seeds=(0,),
        scores=("caption/nats", "caption/cider_d"),
    )
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and an ablation of two runs."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_coco(folder / "coco")
    sweeps.write_ablation(folder, FILE % STEPS)
    return folder


def started(place, runs):
    cleared = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.sweep",
            str(place / "rates.py"),
            f"--runs={place / runs}",
            "--interval=0.2",
            f"--config.data.dir={place / 'coco'}",
        ],
        cwd=sweeps.ROOT,
        env=cleared
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "UNIFIED_MM_CACHE": str(place / "cache"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def table(process):
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    return said, said[said.index("\nrun ") :]


def killed_in_the_second_run(place):
    """A sweep whose first run is finished and whose second has saved; both of its processes die."""
    process = started(place, "killed")
    second = place / "killed" / "rates" / "learning_rate=0.002-0"
    end = time.monotonic() + LIMIT
    while not (second / "checkpoints" / "10" / "SHA256SUMS").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    run = int((second / ".lock").read_text())
    process.kill()
    os.kill(run, signal.SIGKILL)
    process.communicate()
    assert not (second / "result.json").exists()
    return second.parent


def test_the_table_is_the_same_as_without_the_kill(place):
    _, whole = table(started(place, "whole"))
    folder = killed_in_the_second_run(place)
    done = folder / "learning_rate=0.001-0" / "result.json"
    before = done.stat().st_mtime_ns
    said, again = table(started(place, "killed"))
    assert said.startswith("2 runs, 1 finished already")
    assert again == whole
    assert done.stat().st_mtime_ns == before
    log = (folder / "logs" / "learning_rate=0.002-0.log").read_text()
    assert "resuming at step" in log
