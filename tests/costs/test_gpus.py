"""Programs compiled for NVIDIA GPUs that are not there: the extra 'cuda12', in its environment."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LEFT_OUT
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.costs.chips import GPUS
from unified_mm.costs.topologies import PLUGINS, target
from unified_mm.nn.attention.cudnn import widest_head

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.topology,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in PLUGINS),
        reason=f"{LEFT_OUT}: jax's plugin for CUDA is not here, pip install -e '.[test,cuda12]'",
    ),
]


@pytest.mark.parametrize("name", GPUS)
def test_gpus_of_several_hosts(name, monkeypatch):
    """The widest head is that of the card compiled for, with jax too: this machine has none."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    devices, gpu = target(f"{name}:2x4")
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    assert {device.platform for device in devices} == {"gpu"}
    assert {device.device_kind for device in devices} == {GPUS[name].kind}
    assert gpu.memory == int(0.9 * GPUS[name].memory)
    widest = 128 if name == "a100" else 256
    mesh = Mesh(np.array(devices[:1]), "x")
    query = jax.ShapeDtypeStruct(
        (1, 64, 2, widest), jnp.bfloat16, sharding=NamedSharding(mesh, P())
    )

    def attend(x):
        return jax.nn.dot_product_attention(x, x, x, implementation="cudnn")

    with jax.set_mesh(mesh):
        assert widest_head() == widest
        assert "__cudnn$fmhaSoftmax" in jax.jit(attend).lower(query).compile().as_text()


def test_tiny_for_one_h100(tmp_path):
    """As a user types it: what is printed, and cuDNN's attention in each block of the program."""
    hidden = ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["XLA_FLAGS"] = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=jit_step"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "unified_mm.compile", "--config=configs/coco.py:tiny"),
            *("--topology=h100:1", "--config.model.dtype=bfloat16"),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert " of 989 TFLOP/s (dense bfloat16)" in lines[-1]
    facts = json.loads(last)
    assert facts["memory_share"] == 0.75
    assert facts["peak_bytes"] < facts["memory_bytes"] == int(0.75 * GPUS["h100"].memory)
    assert facts["fits"] and facts["traffic_bytes"] > 0
    assert any(name.endswith("-plugin") for name in facts["versions"])
    (program,) = tmp_path.glob("*gpu_after_optimizations.txt")
    calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w*)"', program.read_text())
    backward = [call for call in calls if call.endswith("Backward")]
    assert len(calls) == 2 * len(backward) >= 2 * 3
