"""The least time of a step, by hand."""

from dataclasses import replace

import pytest

from unified_mm.costs.chips import GPUS, Chip
from unified_mm.costs.collectives import Collective
from unified_mm.costs.roofline import roofline, sending_seconds, utilisation

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
    sending = sending_seconds(CHIP, [Collective("collective-permute", sent, 1, 2)])
    least = roofline(CHIP, flops, traffic, sending)
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


def test_gpus_of_several_hosts_send_their_shares_over_the_network():
    gpu = replace(GPUS["h100"], link_bandwidth=8.0, network_bandwidth=1.0, host=4)

    def seconds(kind, size, members):
        return sending_seconds(gpu, [Collective(kind, size, 3, len(members), "", members)])

    # Within a host, three times 3/4 of 32 bytes over links; twice that to add up.
    assert seconds("all-gather", 32, (4, 5, 6, 7)) == 3 * 24 / 8
    assert seconds("all-reduce", 32, (4, 5, 6, 7)) == 3 * 48 / 8
    # Over two hosts each of four sends the other host half of its quarter: 4 bytes; 8 to add up.
    assert seconds("all-gather", 32, tuple(range(8))) == 3 * 32 / 4 / 2
    assert seconds("all-reduce", 32, tuple(range(8))) == 3 * 32 / 4
    # One GPU a host: there is no link. In pairs each sends all.
    assert seconds("all-gather", 32, (0, 4)) == 3 * 16
    assert seconds("collective-permute", 32, (3, 4)) == 3 * 32


def test_utilisation_is_the_share_of_all_chips_peak():
    # 4 chips could do 4,000 a second; 8,000 took 4 seconds.
    assert utilisation(CHIP, 4, 8000, 4.0) == pytest.approx(0.5)
    # At the roofline of a step that computes a quarter more than the model needs: 0.8.
    assert utilisation(CHIP, 4, 16000, roofline(CHIP, 5000.0, 0, 0.0).step) == pytest.approx(0.8)
