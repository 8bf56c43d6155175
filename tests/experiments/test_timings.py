"""The scripts that time parts of a model run to their end, shrunk; what they measure is no test."""

import json
import math
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from experiments import inference_beside, time_exits, time_experts, time_neurons, time_sparse
from experiments.train_beside_peers import RECIPE, Shape, rates, same_losses
from unified_mm.cli.recipes import recipe_config
from unified_mm.config import Config


def test_pytorch_has_the_shape_of_the_recipe_or_refuses_it(tmp_path):
    asked = recipe_config(RECIPE)
    shape = Shape.of(Config(asked.to_dict()), 500)
    assert shape == Shape(500, 128, 4, 512, 4, 64, 8, True, 32, 128)
    shape.write(tmp_path)
    assert Shape.read(tmp_path) == shape
    asked.objectives.captioning.weight = 4.0
    with pytest.raises(ValueError, match=r"captioning.weight=4.0: PyTorch's side .* with 1.0"):
        Shape.of(Config(asked.to_dict()), 500)
    with pytest.raises(ValueError, match="train.optimizer='muon': PyTorch's side .* 'adamw'"):
        Shape.of(Config(recipe_config("configs/coco.py:tiny").to_dict()), 500)


def test_training_is_compared_with_pytorch_without_and_with_huge_pages():
    turns = {"ours, huge pages": [2.0, 2.0], "torch": [8.0, 6.0], "torch, huge pages": [4.0, 3.0]}
    assert rates(turns, "ours, huge pages") == {
        "steps_per_second": 0.5,
        "times_torch": 3.5,
        "times_torch_least_most": [3.0, 4.0],
        "times_torch_with_huge_pages": 1.75,
        "times_torch_with_huge_pages_least_most": [1.5, 2.0],
    }


def test_another_checkout_is_a_peer_if_it_trains_alike():
    turns = {"ours": [2.0], "torch": [4.0], "torch, huge pages": [4.0], "before": [3.0]}
    turns["before, huge pages"] = [1.0]
    found = rates(turns, "ours")
    assert (found["times_before"], found["times_before_with_huge_pages"]) == (1.5, 0.5)
    same_losses([1.0, 2.0], [1.0, 2.0001])
    for other in (2.001, math.nan):
        with pytest.raises(ValueError, match="step 1 has a loss of 2.0 here and of"):
            same_losses([1.0, 2.0], [1.0, other])


ANSWERS = """
import json, sys
print(json.dumps({captions}), flush=True)
for line in sys.stdin:
    print(json.dumps([{seconds}, 2 * {seconds}]), flush=True)
"""


def answering(monkeypatch, **facts):
    """Lets processes stand for checkouts, which say what is given of `this` and `other`."""

    def begin(checkout, run, pictures):
        said = facts["other" if checkout == Path("other") else "this"]
        command = [sys.executable, "-c", ANSWERS.format(**said) if said else ""]
        return subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)

    monkeypatch.setattr(inference_beside, "begin", begin)
    return inference_beside.beside(Path("other"), Path("run"), Path("pictures"), 3)


def test_inference_is_timed_beside_another_checkout_that_writes_the_same(monkeypatch):
    this, other = ({"captions": ["a cube"], "seconds": seconds} for seconds in (1.5, 2.0))
    found = answering(monkeypatch, this=this, other=other)
    assert found.keys() == {"embed_32", "captions_32", "captions_1"}
    assert found["captions_1"] == {
        "seconds": {"this": 1.5, "other": 2.0, "times_other": 0.75},
        "cpu_seconds": {"this": 3.0, "other": 4.0, "times_other": 0.75},
    }
    with pytest.raises(RuntimeError, match="run: the checkouts write other captions: .*a ball"):
        answering(monkeypatch, this=this, other=other | {"captions": ["a ball"]})
    with pytest.raises(RuntimeError, match="ended by itself"):
        answering(monkeypatch, this=this, other=None)


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
    small = {
        "TOKENS": 256,
        "LONG": 512,
        "SIDE": 4,
        "PICTURES": 1,
        "READ": 1,
        "KEEPS": (1.0, 0.5),
        "TURNS": 1,
    }
    found = shrunk(monkeypatch, capsys, time_sparse, **small)
    (forward, backward) = found["long"]
    assert forward["tokens"] == 512 and 0 < forward["bytes"] < backward["bytes"]
    assert all(each["apart"] < 1e-4 for each in (*found["attention"], *found["grid"]))
    assert all(each["of_dense"].keys() == time_sparse.GRIDS.keys() for each in found["grid"])
    assert found["patches"][1]["flops"] < 1
