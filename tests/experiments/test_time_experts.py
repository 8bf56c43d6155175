"""The CPU time of experts beside that of a dense layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARS = {"groups of 8": 1.5, "dropless": 2.5}


@pytest.mark.slow
def test_eight_experts_take_little_more_cpu_time_than_one_dense_layer():
    # A process of its own: that of the tests divides this machine into eight devices.
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "time_experts.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    ratios = json.loads(done.stdout.splitlines()[-1])["ratios"]
    for name, bar in BARS.items():
        assert ratios[name] <= bar, ratios
