"""A signal is noted, and processes stop after the same step."""

import os
import signal

import pytest

from unified_mm.parallel.mesh import make_mesh
from unified_mm.training.loop import AHEAD, InFlight
from unified_mm.training.signals import (
    SharedStopRequest,
    StopRequest,
    stop_on_signals,
    stop_request,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 4, "tensor": 2})


def test_one_process_stops_after_the_step_at_hand(mesh):
    with stop_on_signals(stop_request(mesh, 5)) as stop:
        assert type(stop) is StopRequest
        assert not stop.after(1) and not stop.at_last()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2) and stop.at_last() and stop.exit_code == 143


@pytest.fixture
def as_in_a_terminal():
    """Ctrl-C raises, as it does not for what a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_not_held_back(as_in_a_terminal):
    with pytest.raises(KeyboardInterrupt), stop_on_signals(StopRequest()):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_vote_is_counted_an_interval_later(mesh):
    stop = SharedStopRequest(mesh, 5)
    assert not any(stop.after(step) for step in range(1, 8))
    stop.note(signal.SIGTERM)
    assert [step for step in range(8, 20) if stop.after(step)][:1] == [15]
    assert stop.exit_code == 143


def test_when_all_steps_are_done_a_vote_is_counted_at_once(mesh):
    stop = SharedStopRequest(mesh, 5)
    assert not stop.at_last()
    stop.note(signal.SIGINT)
    assert stop.at_last() and stop.exit_code == 130


def test_few_steps_are_dispatched_that_a_stop_would_wait_for():
    class Step:
        def block_until_ready(self):
            waited.append(self)

    waited, steps, in_flight = [], [Step() for _ in range(5)], InFlight()
    for step in steps:
        in_flight.add(step)
    assert waited == steps[:-AHEAD]
