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
from hand_counts import ROWS, TIMES, WIDTH, W, X, attention, loop, norm, product, traffic
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.costs.chips import GPUS
from unified_mm.costs.memory_share import NAMES
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
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
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


def test_the_counter_agrees_with_counts_by_hand():
    """cuBLAS's products are calls of their own, a norm is one kernel, and attention two."""
    devices, _ = target("h100:1")
    x, w = (ROWS, WIDTH), (WIDTH, WIDTH)
    assert traffic(devices, product, x, w) == pytest.approx(2 * X + W, rel=0.1)
    assert traffic(devices, loop, x, w) == pytest.approx(TIMES * (4 * X + W), rel=0.1)
    assert traffic(devices, norm, x, w) == pytest.approx(2 * X, rel=0.1)
    # Query, key, value and output, and a sum of each row; these, and four gradients.
    shape = batch, length, heads, width = 16, 1024, 16, 128
    whole, sums = 2 * batch * length * heads * width, 4 * batch * length * heads
    moved = traffic(devices, attention, *[shape] * 4)
    assert moved == pytest.approx(4 * whole + sums + 8 * whole + sums, rel=0.1)


def compiled(folder, *arguments):
    """What the command prints as a user types it, and the text of the program."""
    hidden = ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS", *NAMES)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=jit_step"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "unified_mm.compile", "--topology=h100:1"),
            *("--config.model.dtype=bfloat16", *arguments),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (program,) = folder.glob("*gpu_after_optimizations.txt")
    return done.stdout.splitlines(), program.read_text()


def test_tiny_for_one_h100(tmp_path):
    """In each block cuDNN's attention, forward and backward, and nothing else twice."""
    (*lines, last), program = compiled(tmp_path, "--config=configs/coco.py:tiny")
    assert " of 989 TFLOP/s (dense bfloat16)" in lines[-1]
    facts = json.loads(last)
    assert facts["memory_share"] == 0.75
    assert facts["peak_bytes"] < facts["memory_bytes"] == int(0.75 * GPUS["h100"].memory)
    assert facts["fits"] and facts["traffic_bytes"] > 0
    assert any(name.endswith("-plugin") for name in facts["versions"])
    calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w*)"', program)
    backward = [call for call in calls if call.endswith("Backward")]
    assert len(calls) == 2 * len(backward) >= 2 * 3
    # Of a picture alone, and of a text alone, no keys are sorted.
    assert not re.search(r"attention_cudnn_(64x64|32x32)/jit\(take_along", program)
    # Attention's products count, too: nothing is computed again but its scores.
    assert 1 < facts["computed_flops"] / facts["flops"] < 1.1


def test_attention_by_xla_where_nothing_can_be_tried_out(tmp_path):
    """Left to itself the compiler finds no tiles for one of its products."""
    _, program = compiled(
        tmp_path,
        *("--config=configs/coco.py:base", "--config.model.layers=1", "--config.model.unroll=1"),
        *("--config.train.batch_size=256", "--config.model.attention=xla"),
    )
    assert "__cublas$lt$matmul" in program and "__cudnn" not in program
