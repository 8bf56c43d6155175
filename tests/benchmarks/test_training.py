"""What the benchmark of training says of the loader: how fast it is, and what it holds."""

from mmap import mmap
from unittest.mock import Mock

import numpy as np

from unified_mm.benchmarks import training
from unified_mm.training.setup import Setup

SETUP = Mock(spec=Setup, phases=[Mock(batch_size=4)], task=Mock())


def test_memory_that_grows_is_seen(monkeypatch):
    """Held in pages of their own: a process that has run a while fills what it had freed first."""

    def batches(setup, phase, start):
        held = []
        while True:
            held.append(mmap(-1, 2**23))
            np.frombuffer(held[-1], np.uint8)[:] = 1
            yield held

    monkeypatch.setattr(training, "phase_batches", batches)
    rate, (first, half, last) = training.loader_alone(SETUP, 20)
    assert rate > 0 and last - half > 60 * 2**20 and half - first > 60 * 2**20


def test_the_loader_is_set_beside_training(monkeypatch):
    class Step:
        bytes = 7

        def __init__(self, setup):
            pass

        def seconds(self, steps):
            return [0.02] * steps

    monkeypatch.setattr(training, "Step", Step)
    monkeypatch.setattr(training, "loader_alone", lambda *_: (600.0, [1, 2, 3]))
    monkeypatch.setattr(training, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(training, "training_flops", lambda phase: 1e6)
    found = training.measure(SETUP, 5)
    assert found["images_per_second"] == 200.0 and found["loader_times_training"] == 3.0
    assert found["loader_images"] == 20 and found["loader_resident_bytes"] == [1, 2, 3]
