"""The CPU time of experts beside that of a dense layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_experts_are_timed_beside_a_dense_layer():
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
    assert ratios.keys() == {"dense", "groups of 8", "groups of 1", "dropless"}
    assert ratios["dense"] == 1 and min(ratios.values()) > 0
