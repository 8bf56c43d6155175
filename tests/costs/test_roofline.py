"""The least time of a step, by hand."""

import pytest

from unified_mm.costs.chips import Chip
from unified_mm.costs.roofline import roofline, utilisation

CHIP = Chip(memory=100, flops=1000.0, memory_bandwidth=100.0, link_bandwidth=10.0)


@pytest.mark.parametrize(
    "flops, traffic, sent, step, serial, bound, efficiency",
    [
        (5000.0, 300, 20, 5.0, 7.0, "compute", 1.0),
        (2000.0, 300, 20, 3.0, 5.0, "memory", 1.0),
        (2000.0, 300, 60, 6.0, 9.0, "collectives", 0.5),
        (2000.0, 300, 0, 3.0, 3.0, "memory", 1.0),
    ],
)
def test_the_slowest_part_bounds_the_step(flops, traffic, sent, step, serial, bound, efficiency):
    least = roofline(CHIP, flops, traffic, sent)
    assert (least.compute, least.memory, least.collectives) == (
        flops / 1000,
        traffic / 100,
        sent / 10,
    )
    assert least.step == step
    assert least.serial == serial
    assert least.bound == bound
    assert least.scaling_efficiency == efficiency
    assert least.serial_scaling_efficiency == pytest.approx(1 - sent / 10 / serial)


def test_utilisation_is_the_share_of_all_chips_peak():
    # 4 chips could do 4,000 a second; 8,000 took 4 seconds.
    assert utilisation(CHIP, 4, 8000, 4.0) == pytest.approx(0.5)
    # At the roofline of a step that computes a quarter more than the model needs: 0.8.
    assert utilisation(CHIP, 4, 16000, roofline(CHIP, 5000.0, 0, 0).step) == pytest.approx(0.8)
