"""The rates of the metrics, by a clock and a device that are made up."""

from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from unified_mm.training import loop
from unified_mm.training.phases import Phase
from unified_mm.training.progress import Progress
from unified_mm.training.state import TrainState
from unified_mm.training.step import StepMetrics

STEPS = 23


class Clock:
    """Seconds that pass where something is waited for, and no others."""

    now = 0.0

    def until(self, moment):
        self.now = max(self.now, moment)


class Result:
    """A number that a device will have given at a time."""

    def __init__(self, clock, done):
        self.clock, self.done = clock, done

    def block_until_ready(self):
        self.clock.until(self.done)

    def __int__(self):
        self.block_until_ready()
        return -1


class Starved:
    """Knows when each step is done, as a thread would."""

    waiting = staticmethod(nullcontext)

    def until(self, measured):
        done = Future()
        done.set_result(measured.bad_step.done)
        return done

    def take(self):
        return 0.0


def made(kind, **fields):
    """An instance of a class with these attributes and no others."""
    found = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


@pytest.fixture
def rates_of(monkeypatch, capsys):
    """Returns a function that trains on a device of one step a second, and gives the rates."""

    def rates(one_by_one, reading, every):
        clock, written, free = Clock(), {}, [0.0]
        state = TrainState(0, (), (), None, None, Result(clock, 0.0))

        def step(state, rows):
            free[0] = max(clock.now, free[0]) + 1.0
            bad_step = Result(clock, free[0])
            return state.replace(bad_step=bad_step), StepMetrics({"loss": (1.0, 1.0)}, 1, bad_step)

        def batches(*_):
            while True:
                clock.until(clock.now + reading)
                yield None

        monkeypatch.setattr("time.perf_counter", lambda: clock.now)
        monkeypatch.setattr(loop, "computed", lambda phase, *_, **__: phase)
        monkeypatch.setattr(loop, "phase_batches", batches)
        monkeypatch.setattr(loop, "to_global", lambda rows, mesh: rows)
        monkeypatch.setattr(loop, "shares_threads", lambda mesh: one_by_one)
        monkeypatch.setattr(loop.Run, "metadata", lambda self, step: {})
        options = SimpleNamespace(
            logging=SimpleNamespace(every=5),
            checkpoint=SimpleNamespace(every=every),
            evaluation=SimpleNamespace(every=0),
            train=SimpleNamespace(steps=STEPS),
        )
        phase = made(Phase, start=0, stop=STEPS, batch_size=8, rows=SimpleNamespace(examples=()))
        run = made(
            loop.Run,
            setup=SimpleNamespace(
                options=options,
                phases=[phase],
                config=SimpleNamespace(data=None),
                train=SimpleNamespace(unchecked=0),
                mesh=None,
            ),
            checkpoints=SimpleNamespace(
                check=lambda: None, save=lambda *_: clock.until(clock.now + 9)
            ),
            metrics=SimpleNamespace(write=lambda step, values: written.update({step: values})),
            stop=SimpleNamespace(after=lambda step: False),
            say=print,
            predictor=None,
            unread=SimpleNamespace(say_new=lambda say: None, fault=lambda rows: ""),
            trace=SimpleNamespace(before=lambda *_: nullcontext(), ends_with=lambda step: False),
            ahead=SimpleNamespace(step_of=lambda phase: step),
            starved=Starved(),
        )
        run.steps(phase, state, 0, Progress(0, STEPS))
        capsys.readouterr()
        assert list(written) == [5, 10, 15, 20, STEPS]
        return [values["time/steps_per_second"] for values in written.values()]

    return rates


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("every", [STEPS, 7])
def test_rates_are_those_of_steps_and_not_of_what_is_saved(rates_of, one_by_one, every):
    assert rates_of(one_by_one, 0.0, every) == pytest.approx([1.0] * 5)


def test_the_last_rate_is_that_of_the_data_where_devices_wait_for_it(rates_of):
    assert rates_of(False, 3.0, STEPS) == pytest.approx([5 / 16] + [1 / 3] * 4)
