"""Ablations and runs that the tests of sweeps share."""

import json
import sys
from pathlib import Path

from experiments.sweeping import runs as runs_module
from unified_mm.default_config import defaults

STAND_IN = Path(__file__).with_name("stand_in_run.py")
ROOT = Path(__file__).parents[1]
FILE = '''"""Which rate? Expected: the higher one."""
from experiments.sweeping.ablation import Ablation


def get_ablation(size):
    return Ablation(
        config="configs/coco.py:tiny",
        common={"train.steps": 10},
        variants={"low": {"train.learning_rate": 0.001}, "high": {"train.learning_rate": 0.002}},
        seeds=(0, 1),
        scores=("caption/nats",),
    )
'''


def write_ablation(folder, text=FILE):
    """An ablation's file."""
    path = folder / "rates.py"
    path.write_text(text)
    return path


def stand_in_command(run):
    """In place of `runs.python_command`: trains nothing."""
    config = Path(f"{run.folder.path}.config.json")
    config.parent.mkdir(parents=True, exist_ok=True)
    # With the defaults, which bring jax with them where they are imported.
    config.write_text(json.dumps([runs_module.asked_config(run), defaults()]))
    return [sys.executable, str(STAND_IN), str(run.folder.path), str(config)]


def starts(folder):
    """The steps that the run in a folder was started at."""
    return [int(line) for line in (folder / "starts").read_text().split()]
