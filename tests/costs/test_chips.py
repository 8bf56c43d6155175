"""Chips and topologies: the table, and what is refused before any compiler is asked."""

import jax
import pytest
from hand_counts import ROWS, TIMES, WIDTH, W, X, layers, loop, norm, product, traffic

from unified_mm.costs import topologies
from unified_mm.costs.chips import CHIPS, GPUS, TPUS
from unified_mm.costs.memory_share import NAMES, memory_share, with_share
from unified_mm.costs.topologies import target


def test_the_table_agrees_with_what_is_published_of_whole_pods():
    """Peak compute of a pod, and the intensity (FLOPs a byte) where memory is the bound no more."""
    assert CHIPS["v5e"].flops * 256 == pytest.approx(50.63e15, rel=0.01)
    assert CHIPS["v6e"].flops * 256 == pytest.approx(234.9e15, rel=0.01)
    assert CHIPS["v4"].flops * 4096 == pytest.approx(1.1e18, rel=0.03)
    for chip in TPUS.values():
        assert 150 < chip.flops / chip.memory_bandwidth < 600
        assert chip.link_bandwidth < chip.memory_bandwidth


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v9:4x4", r"must be NAME:SIZES such as v5e:4x4 .*there are v4, v5e, v5p, v6e.*cpu:NUMBER"),
        ("v100:8", r"NAME:GPUS or NAME:HOSTSxGPUS .*there are a100, h100, h200, b200"),
        ("v5e", "must be NAME:SIZES"),
        ("v5e:4xx4", "must be NAME:SIZES"),
        ("cpu:many", "must be NAME:SIZES"),
        ("v5e:4x4x4", "v5e makes tori of 2 dimensions and at most 256 chips"),
        ("v6e:32x32", "at most 256 chips"),
        ("v5p:8x8", "v5p makes tori of 3 dimensions"),
        ("v5e:0x4", "makes tori of"),
        ("h100:16", "a host has 1 to 8 GPUs, so it is h100:GPUS or h100:HOSTSxGPUS"),
        ("h100:0", "a host has 1 to 8"),
        ("h100:0x8", "a host has 1 to 8"),
        ("h100:1x2x8", "a host has 1 to 8"),
        ("cpu:0", "at least one device is needed"),
        ("cpu:4096", f"this process has made {len(jax.devices())} already"),
    ],
)
def test_wrong_topologies_are_refused(topology, message):
    with pytest.raises(ValueError, match=message):
        target(topology)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the TPU's compiler, libtpu: pip install .*tpu"):
        target("v5e:4x4")
    with pytest.raises(
        ValueError, match=r"needs the GPU's compiler.*no GPU: .*pip install.*cuda12"
    ):
        target("h100:8")


def test_the_share_of_memory_is_read_and_said_by_either_name(monkeypatch):
    new, old = NAMES
    assert memory_share({}) == memory_share({new: ""}) == 0.75
    assert memory_share({old: "0.5"}) == 0.5 == memory_share({new: ".5", old: ""})
    assert with_share({old: "0.5", "HOME": "/"}, 0.35) == {new: "0.35", "HOME": "/"}
    for value in ("0", "1.5", "nan", "half"):
        with pytest.raises(ValueError, match=rf"^{old}={value}: must be a share of a GPU's memory"):
            memory_share({old: value})
    monkeypatch.setenv(new, "2")
    with pytest.raises(ValueError, match=f"^{new}=2: must"):
        target("h100:8")


def test_gpus_agree_with_what_is_published_of_a_host():
    """NVIDIA's DGX: memory, tensor cores, NVLink and network of eight together."""
    assert CHIPS["h100"].memory * 8 == pytest.approx(640e9, rel=0.07)
    assert CHIPS["h200"].memory * 8 == pytest.approx(1128e9, rel=0.08)
    assert CHIPS["b200"].memory * 8 == pytest.approx(1440e9, rel=0.07)
    for gpu in GPUS.values():
        assert 100 < gpu.flops / gpu.memory_bandwidth < 400
        assert gpu.network_bandwidth < gpu.link_bandwidth < gpu.memory_bandwidth
        # Each multiprocessor's tensor cores: 1024, 2048 or 4096 products of bfloat16 a clock.
        products = gpu.flops / 2 / gpu.cores / (gpu.clock * 1e9)
        assert min(abs(products / size - 1) for size in (1024, 2048, 4096)) < 0.1


def test_devices_of_this_machine_have_no_known_peaks():
    devices, chip = target("cpu:4")
    assert devices == jax.devices()[:4]
    assert chip is None


@pytest.mark.topology
@pytest.mark.parametrize(
    "topology, count",
    [("v5e:4x4", 16), ("v6e:16x16", 256), ("v5p:4x4x8", 128), ("v4:2x2x4", 16), ("v6e:1x1", 1)],
)
def test_one_device_a_chip(topology, count):
    devices, chip = target(topology)
    assert len(devices) == count
    assert {device.platform for device in devices} == {"tpu"}
    assert chip == CHIPS[topology.split(":")[0]]


@pytest.mark.topology
def test_the_counter_agrees_with_counts_by_hand():
    """A loop copies what it hands on, a norm reads its rows twice, a slice is no whole stack."""
    devices, _ = target("v5e:1x1")
    x, w = (ROWS, WIDTH), (WIDTH, WIDTH)
    assert traffic(devices, product, x, w) == pytest.approx(2 * X + W, rel=0.1)
    assert traffic(devices, loop, x, w) == pytest.approx(TIMES * (4 * X + W), rel=0.1)
    stack = traffic(devices, layers, x, (TIMES, *w))
    assert stack == pytest.approx(TIMES * (2 * X + W), rel=0.1)
    assert traffic(devices, norm, x, w) == pytest.approx(3 * X, rel=0.1)


@pytest.mark.topology
def test_what_the_compiler_refuses_is_one_line():
    with pytest.raises(ValueError, match="--topology=v5e:3x5: .*not divisible"):
        target("v5e:3x5")
