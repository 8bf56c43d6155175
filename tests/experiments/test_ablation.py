"""Ablation files: what they may say, what is refused by name, and that ours can be carried out."""

from pathlib import Path

import jax
import pytest
from sweeps import FILE, ROOT, write_ablation

from experiments.reporting.summary import EQUAL
from experiments.sweeping.ablation import Ablation, Search, Span, load_ablation
from experiments.sweeping.runs import asked_config, recipe_of, runs_of
from unified_mm.cli.recipes import load_recipe
from unified_mm.config import Config
from unified_mm.training.ahead import abstract_phases
from unified_mm.training.phases import training_flops

ABOUT_PARTS = (
    Path(ROOT / "experiments" / f"{name}.py")
    for name in ("experts", "grid", "neurons", "patches", "queries", "upcycling")
)
OURS = [*sorted(Path(ROOT / "experiments" / "ablations").glob("*.py")), *ABOUT_PARTS]
WORDS = 374  # that the tokenizer finds in the world's captions
BASE = {"config": "configs/coco.py:tiny", "scores": ("caption/nats",), "seeds": (0, 1)}


def runs(tmp_path, **changes):
    return runs_of(Ablation(**{**BASE, **changes}), tmp_path)


def test_runs_come_seed_by_seed_with_their_commands(tmp_path):
    name, ablation = load_ablation(str(write_ablation(tmp_path)))
    found = runs_of(ablation, tmp_path / "sweep", more=["--config.data.threads=1"])
    assert name == "rates"
    assert [run.name for run in found] == ["low-0", "high-0", "low-1", "high-1"]
    assert found[3].arguments() == [
        "-m",
        "unified_mm.main",
        f"--config={ROOT}/configs/coco.py:tiny",
        "--config.train.steps=10",
        "--config.train.learning_rate=0.002",
        "--config.data.threads=1",
        "--config.seed=1",
        f"--workdir={tmp_path}/sweep/high-1",
    ]


def test_a_size_is_part_of_the_name(tmp_path):
    path = write_ablation(tmp_path)
    assert load_ablation(f"{path}:tiny")[0] == "rates"
    assert load_ablation(f"{path}:base")[0] == "rates_base"


def test_a_grid_is_every_combination(tmp_path):
    grid = {"train.learning_rate": (0.1, 0.2), "model.layers": (1, 2)}
    names = [run.variant for run in runs(tmp_path, grid=grid, seeds=(3,))]
    assert names == [
        "learning_rate=0.1_layers=1",
        "learning_rate=0.1_layers=2",
        "learning_rate=0.2_layers=1",
        "learning_rate=0.2_layers=2",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"train.learning_rat": 1.0}}}, "'a'.*'train.learning_rat'; did you"),
        ({"variants": {"a": {"train.steps": "many"}}}, "variant 'a':.*many"),
        ({"variants": {"a": {}, "b": {"config": "configs/none.py"}}}, "variant 'b':.*none.py"),
        ({"variants": {"a": {}, "b": {"seed": 3}}}, "variant 'b' sets seed, which the sweep does"),
        ({"variants": {"a": {"model.layers": 1}, "b": {"model.layers": 1}}}, "'a' and 'b' are the"),
        ({"variants": {"a/b": {}}}, "variant 'a/b': letters"),
        ({}, "variants or a grid"),
        ({"variants": {"a": {}}, "grid": {"train.b1": (0.5,)}}, "variants or a grid"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        runs(tmp_path, **changes)


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--only=c: there are a, b"):
        runs_of(Ablation(**BASE, variants={"a": {}, "b": {"train.b1": 0.5}}), tmp_path, only=["c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.split("\n", 1)[1], "has no docstring"),
        ('"""A question?"""\n', "defines no get_ablation"),
        (FILE.replace("seeds=(0, 1)", "seeds=(1, 1)"), r"seeds=\(1, 1\): at least one, each once"),
        (FILE.replace('("caption/nats",)', "()"), r"scores=\(\): a tuple"),
        (FILE.replace('("caption/nats",)', '"caption/nats"'), "scores='caption/nats': a tuple"),
        (FILE.replace("common=", "comon="), "rates.py, line 6: TypeError: .*'comon'"),
        (FILE.replace("return", "return ("), "rates.py, line 6: SyntaxError"),
        (FILE.replace("return", "import nothing_such;"), "line 6: ModuleNotFoundError"),
        (FILE.replace("(size)", "()"), "TypeError: .*positional argument"),
        (FILE.replace("seeds=(0, 1)", "seeds=3"), "rates.py.*TypeError"),
        (FILE.replace("seeds=(0, 1)", "seeds=(0,), search=3"), "search must be a Search"),
    ],
)
def test_files_that_are_no_ablation(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_ablation(str(write_ablation(tmp_path, text)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": (0, 0)}, "seeds 0, 0: each may come once"),
        ({"seeds": (-1,)}, "seed=-1: must be a whole number"),
        ({"seeds": (2**32,)}, "seed=4294967296: must be"),
        ({"more": ["--config.seed=3"]}, "--config.seed=3: the sweep sets that itself"),
    ],
)
def test_what_a_command_may_not_ask(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        runs_of(Ablation(**BASE, variants={"a": {}}), tmp_path, **given)


def test_a_power_law_is_of_a_score():
    with pytest.raises(ValueError, match="power_law: caption/nats is none of the scores"):
        Ablation(**{**BASE, "scores": ("caption/cider_d",)}, power_law="caption/nats")


def test_searches_that_cannot_be():
    with pytest.raises(ValueError, match="low=2, high=1.*low must be below high"):
        Span(2, 1)
    with pytest.raises(ValueError, match="above 0 for a logarithm"):
        Span(0, 1, log=True)
    with pytest.raises(ValueError, match="needs something in its space"):
        Search({}, "caption/nats")


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_ablations_say_what_recipes_know(path, size, tmp_path):
    """Fields, values and recipes of every variant, on the world and on COCO."""
    _, ablation = load_ablation(f"{path}:{size}")
    question = load_recipe(path).__doc__
    assert "Question:" in question and "Expected:" in question
    found = runs_of(ablation, tmp_path)
    assert len(found) == len(ablation.all_variants()) * len(ablation.seeds)
    source = {recipe_of(run).config.data.source for run in found[:3]}
    assert source == {"world" if size == "tiny" else "coco"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "size"),
    # Those about parts at one size: the other has the same variants, without bfloat16.
    [(path, "base") for path in OURS]
    + [(path, "tiny") for path in OURS if path.parent.name == "ablations"],
    ids=lambda each: each if isinstance(each, str) else each.stem,
)
def test_our_ablations_can_be_trained(path, size, tmp_path):
    """Every variant can be built, and where the file says so has the base's FLOPs."""
    _, ablation = load_ablation(f"{path}:{size}")
    flops = []
    for run in runs_of(ablation, tmp_path, seeds=(0,)):
        config = asked_config(run)
        if size == "tiny":
            config["data"]["vocabulary_size"] = WORDS
        phases = abstract_phases(Config(config), jax.devices()[:1])
        assert phases[-1].stop == config["train"]["steps"], run.name
        flops.append(sum((each.stop - each.start) * training_flops(each) for each in phases))
    if path.stem in ("fusion", "objectives", "phases", "rules"):
        assert max(flops) <= (1 + EQUAL) * flops[0] and min(flops) >= (1 - EQUAL) * flops[0]


def test_the_questions_are_there():
    assert [path.stem for path in OURS if path.parent.name == "ablations"] == [
        "fusion", "objectives", "optimizer", "parameters", "phases", "positions", "rules", "scale",
    ]  # fmt: skip
