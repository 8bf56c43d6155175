"""The scripts that time parts of a model run to their end, shrunk; what they measure is no test."""

import json

import pytest

from experiments import time_exits, time_experts, time_neurons, time_sparse


def shrunk(monkeypatch, capsys, script, **constants):
    """Returns what a script prints last, with smaller constants."""
    for name, value in constants.items():
        monkeypatch.setattr(script, name, value)
    script.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_exits_are_timed_beside_all_layers(monkeypatch, capsys):
    small = {"LAYERS": 2, "EXIT": 1, "WIDTH": 16, "TOKENS": 4, "ROWS": (1,), "TURNS": 1}
    ratios = shrunk(monkeypatch, capsys, time_exits, **small)["ratios by batch"]["1"]
    assert set(time_exits.WAYS) < set(ratios) and ratios["all layers"] == 1


@pytest.mark.slow
def test_experts_are_timed_beside_a_dense_layer(monkeypatch, capsys):
    small = {"ROWS": 8, "TOKENS": 8, "WIDTH": 8, "HIDDEN": 16, "TURNS": 1}
    ratios = shrunk(monkeypatch, capsys, time_experts, **small)["ratios"]
    assert ratios.keys() == {"dense", *time_experts.WAYS}
    assert ratios["dense"] == 1 and min(ratios.values()) > 0


@pytest.mark.slow
def test_few_neurons_are_timed_beside_all(monkeypatch, capsys):
    small = {"WIDTH": 16, "PATCHES": 6, "TURNS": 1, "CALLS": 1}
    found = shrunk(monkeypatch, capsys, time_neurons, **small)
    assert all(share > 0 for share in found["share of the time of all neurons"].values())


@pytest.mark.slow
def test_sparse_attention_is_timed_beside_dense(monkeypatch, capsys):
    small = {"TOKENS": 256, "LONG": 512, "SIDE": 4, "PICTURES": 1, "KEEPS": (1.0, 0.5), "TURNS": 1}
    found = shrunk(monkeypatch, capsys, time_sparse, **small)
    (forward, backward) = found["long"]
    assert forward["tokens"] == 512 and 0 < forward["bytes"] < backward["bytes"]
    assert all(each["apart"] < 1e-4 for each in (*found["attention"], *found["grid"]))
    assert all(each["of_dense"].keys() == time_sparse.GRIDS.keys() for each in found["grid"])
    assert found["patches"][1]["flops"] < 1
