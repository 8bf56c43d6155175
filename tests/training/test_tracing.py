"""A trace of some steps: which operations took longest, and where in the model they are."""

import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from unified_mm.costs.chips import CHIPS
from unified_mm.costs.peaks import chip_of, peak_of
from unified_mm.training.progress import Progress, Starved
from unified_mm.training.tracing import SKIPPED, Trace, own_times, place_of, places_in


def test_time_of_a_loop_is_not_that_of_its_body():
    events = [("while", 0.0, 10.0), ("dot", 1.0, 4.0), ("add", 2.0, 1.0), ("dot", 6.0, 3.0)]
    after = [("copy", 11.0, 2.0)]
    assert own_times(after + events) == [
        ("while", 3.0),
        ("dot", 3.0),
        ("add", 1.0),
        ("dot", 3.0),
        ("copy", 2.0),
    ]


def test_places_are_those_in_the_model():
    name = "jit(step)/transpose(jvp(Early))/while/body/closed_call/block_0/up/dot_general"
    assert place_of(name) == "Early/block_0/up/dot_general (backward)"
    text = f'  ROOT %dot.3 = f32[2]{{0}} dot(%a, %b), metadata={{op_name="{name}" id=1}}\n'
    assert places_in(text) == {"dot.3": place_of(name)}


def test_traces_the_steps_that_were_asked_for(tmp_path):
    @jax.jit
    def step(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ y), x)

    @jax.jit
    def evaluation(x):
        return jnp.cos(x)

    x = evaluation(jnp.full((64, 64), 0.01))
    trace = Trace.of(tmp_path / "profile", 2, [(0, 9)])
    for number in range(1, 10):
        with trace.before(number, x):
            x = step(x)
            evaluation(x).block_until_ready()
        assert trace.running == (SKIPPED < number <= SKIPPED + 2)
        if trace.ends_with(number):
            trace.finish(x, step.lower(x).compile().as_text())
    told = json.loads((tmp_path / "profile/operations.json").read_text())
    assert (told["first"], told["last"]) == (SKIPPED + 1, SKIPPED + 2)
    names = [each["name"] for each in told["operations"]]
    assert any("dot_general" in name for name in names)
    assert not any("cos" in name for name in names)  # of another program
    assert 0 < sum(each["share"] for each in told["operations"]) <= 1.001


def test_a_trace_of_more_steps_than_are_left_is_refused(tmp_path):
    with pytest.raises(ValueError, match="from step 90 to 100, 100 to 105: ask for at most 7"):
        Trace.of(tmp_path, 8, [(90, 100), (100, 105)])
    assert Trace.of(tmp_path, 7, [(90, 100)]).last == 100
    # None lies in two phases, whose programs differ.
    late = Trace.of(tmp_path, 2, [(95, 99), (99, 104)])
    assert (late.first, late.last) == (103, 104)
    assert Trace.of(tmp_path, 0, [(99, 100)]).last < Trace.of(tmp_path, 0, [(99, 100)]).first


def test_waiting_counts_from_when_the_device_was_done(monkeypatch):
    clock = iter([10.0, 14.0, 20.0, 25.0, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    starved = Starved()
    with starved.waiting():  # before the first step: all of it
        pass
    assert starved.take() == 4.0
    starved._done = SimpleNamespace(done=lambda: True, result=lambda: 23.0)
    with starved.waiting():  # the device was at work until 23
        pass
    starved._done = SimpleNamespace(done=lambda: False)
    with starved.waiting():  # it still is
        pass
    assert starved.take() == 2.0 and starved.take() == 0.0


def test_the_end_of_a_step_is_noted_without_waiting():
    starved = Starved()
    assert starved.until(jnp.ones(3) + 1).result() > 0


def test_rates_hold_the_share_of_waiting(capsys):
    progress = Progress(0, 4)
    rates = progress.update(2, {"loss": 1.0}, 8, 1e9, time.perf_counter())
    assert rates["time/waiting_for_data"] == 1.0
    assert rates["time/examples_per_second"] == 8 * rates["time/steps_per_second"]
    assert "step 2/4" in capsys.readouterr().out


def test_peaks_by_the_names_of_jax():
    assert chip_of("TPU v5 lite")[0] == "v5e" and chip_of("TPU v6 lite")[0] == "v6e"
    assert chip_of("NVIDIA A100-SXM4-80GB")[1] == CHIPS["a100"]
    assert chip_of("NVIDIA A100-SXM4-40GB")[1].memory_bandwidth == 1555e9
    slower = ("NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    for kind in ("cpu", "NVIDIA X1", "NVIDIA A100", "NVIDIA GeForce RTX 4090", *slower):
        assert chip_of(kind) is None
    peak, said = peak_of([SimpleNamespace(device_kind="TPU v4")] * 4)
    assert peak == 4 * 275e12 and "275 TFLOP/s" in said and "v4" in said
    assert peak_of(jax.devices()) is None
    peak, said = peak_of(jax.devices()[:2], 3e11)
    assert peak == 6e11 and said == "0.3 TFLOP/s, logging.peak_flops of each cpu"
