"""`python -m unified_mm.compile` as a user types it, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[1]
SMALL = [flag for flag in commands.SMALL if "vocabulary" not in flag]


def run(*arguments, **more):
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-m", "unified_mm.compile", *arguments],
        cwd=ROOT,
        env={**environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **more},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_a_small_step_on_eight_devices(tmp_path):
    """It is compiled, not read from what was compiled before, and not kept."""
    done = run(
        *("--config=configs/coco.py:tiny", "--topology=cpu:8", *SMALL, "--config.mesh.tensor=2"),
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["chips"] == 8
    assert told["mesh"]["data"] == 4 and told["mesh"]["tensor"] == 2
    assert told["peak_bytes"] > told["parameter_bytes"] > 0
    assert told["collectives"]["all-reduce"]["count"] > 0
    assert done.stdout.startswith("cpu:8: 8 chips, mesh data 4 x tensor 2, batch 8\n")
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_a_users_error_is_one_line():
    done = run("--config=configs/coco.py:tiny", "--topology=v5e:4x4x4")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --topology=v5e:4x4x4: v5e makes tori")
    assert done.stderr.count("\n") == 1


@pytest.mark.topology
def test_what_does_not_fit_on_a_real_topology():
    """The large model, whole on each of four chips with half a million tokens."""
    done = run(
        "--config=configs/coco.py:large",
        "--topology=v5e:2x2",
        "--config.train.batch_size=2048",
        "--config.model.unroll=1",  # it is compiled sooner
    )
    assert done.returncode == 1
    *_, problem, last = done.stdout.splitlines()
    told = json.loads(last)
    assert not told["fits"]
    assert told["peak_bytes"] > told["memory_bytes"] > 0
    assert "too few" in problem and "train.batch_size" in problem
