"""What all kept results were trained with stays, whatever the recipes to begin with become.

`frozen_configs.json` is the resolved config of every variant of every ablation: by size the base,
and what each variant has other than it. It is of the day on which `experiments/recipe.py` left
`configs/coco.py`; a field that is newer than that has its default.
"""

import copy
import json
from pathlib import Path

import pytest
from sweeps import ROOT

from experiments.sweeping.ablation import load_ablation
from experiments.sweeping.runs import asked_config, runs_of
from unified_mm.default_config import defaults
from unified_mm.runs.saved import todays_config

FROZEN = json.loads(Path(__file__).with_name("frozen_configs.json").read_text())
ABLATIONS = sorted(path.stem for path in (ROOT / "experiments" / "ablations").glob("*.py"))


def frozen(size, ablation, variant):
    """The config that a variant had, as a run of that day is read now."""
    config: dict = {}
    changes = FROZEN[size]["changes"][ablation][variant]
    for name, value in copy.deepcopy({**FROZEN[size]["base"], **changes}).items():
        *groups, last = name.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return json.loads(json.dumps(todays_config(config, defaults())))


def asked_of(size, ablation):
    return load_ablation(f"{ROOT}/experiments/ablations/{ablation}.py:{size}")[1]


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_base_of_each_ablation_is_what_it_was(ablation, size, tmp_path):
    """Without a budget of FLOPs, which is looked for in seconds and changes no base."""
    asked = asked_of(size, ablation)
    budget = ["--config.model.budget=0"]
    run, *_ = runs_of(asked, tmp_path, seeds=(0,), only=(asked.base,), more=budget)
    was = frozen(size, ablation, asked.base)
    assert asked_config(run) == {**was, "model": {**was["model"], "budget": 0.0}}
    assert list(asked.all_variants()) == list(FROZEN[size]["changes"][ablation])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_so_is_every_variant(ablation, size, tmp_path):
    for run in runs_of(asked_of(size, ablation), tmp_path, seeds=(0,)):
        assert asked_config(run) == frozen(size, ablation, run.variant), run.name
