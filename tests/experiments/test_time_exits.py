"""The CPU time of a model whose tokens leave half way, beside that of all layers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_half_of_the_layers_with_a_check_take_less_than_four_fifths_of_the_time():
    # A process of its own: that of the tests divides this machine into eight devices.
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "time_exits.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    ratios = json.loads(done.stdout.splitlines()[-1])["ratios by batch"]
    assert ratios["1"]["forced at the exit"] <= 0.78, ratios
