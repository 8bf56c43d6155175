"""Runs with other optimizers than AdamW: divided over devices, taken on, loaded."""

import commands
import jax
import numpy as np
import pytest
import tiny

import unified_mm
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.training.progress import Starved

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_a_run_is_trained_taken_on_and_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    ready = []  # after each step: on devices that share threads one program alone may wait
    until = Starved.until

    def noted(starved, results):
        ready.append(results.bad_step.is_ready())
        return until(starved, results)

    monkeypatch.setattr(Starved, "until", noted)
    data, workdir = tiny.write_coco(tmp_path / "coco"), tmp_path / "run"
    arguments = (
        "--config=configs/coco.py:tiny",
        *commands.SMALL,
        f"--config.data.dir={data}",
        f"--workdir={workdir}",
        f"--config.train.optimizer={name}",
        "--config.train.schedule=constant",
        "--config.mesh.fsdp=2",
    )
    commands.train(*arguments)
    commands.train(*arguments, "--config.train.steps=6")
    assert ready == [True] * 6
    model = unified_mm.load(workdir)
    assert model.step == 6
    scored = "average" if name == "schedule_free" else "params"
    with Checkpoints(RunFolder(workdir).checkpoints, read_only=True) as checkpoints:
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
        saved = checkpoints.restore({scored: wanted}, partial=True).state[scored]
    jax.tree.map(np.testing.assert_array_equal, model.params, saved)
