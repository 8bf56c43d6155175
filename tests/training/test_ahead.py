"""The step for devices that are not there is the step that trains."""

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from unified_mm.cli.recipes import recipe_config
from unified_mm.config import Config
from unified_mm.costs.chips import CHIPS, Chip
from unified_mm.costs.flops import equations
from unified_mm.costs.topologies import target
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import rule_items, shard_bytes, to_global
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.task import Task, build_task, parameter_counts
from unified_mm.training import estimate as estimating
from unified_mm.training.ahead import (
    DoesNotFit,
    StepAhead,
    abstract_phases,
    program_text,
    stand_in_data,
)
from unified_mm.training.compilation import Compilation
from unified_mm.training.estimate import estimate, lines, problem
from unified_mm.training.layout import attention_line
from unified_mm.training.loop import first_phase, phase_batches
from unified_mm.training.phases import Phase, batch_shapes, computed_flops, training_flops
from unified_mm.training.setup import Setup, plan, prepare
from unified_mm.training.state import compiled_for_once
from unified_mm.training.step import compiler_options

CONFIGS = Path(__file__).parents[2] / "configs"
BOTH = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2, "data__vocabulary_size": 320}
WIDE = {"model__width": 64, "model__feed_forward": 256, "model__layers": 8, "train__batch_size": 32}


def planned(**changes):
    config = tiny.config_dict(objectives__matching__weight=0.0, **changes)
    return abstract_phases(Config(config.to_dict()), jax.devices())


def recipe(name):
    return Config(recipe_config(f"{CONFIGS / name}").to_dict())


@pytest.fixture(scope="module")
def facts():
    """A step of eight devices, for a chip that is slow, and a little too small for it."""
    (phase,) = planned(**BOTH, **WIDE)
    chip = Chip(2**22, 1e9, 1e9, 1e9)
    return phase, chip, estimate(phase, chip)


@pytest.mark.slow
def test_what_is_lowered_is_what_a_run_lowers(tmp_path):
    """Beside a run with its data read and its tokenizer trained."""
    config = tiny.config_dict(mesh__data=4, mesh__tensor=2)
    config.data.dir = str(tiny.write_coco(tmp_path / "coco"))
    config.data.cache_dir = str(tmp_path / "cache")
    setup = prepare(Config(config.to_dict()), RunFolder(tmp_path / "run"), lambda _: None)
    config.data.vocabulary_size = setup.task.tokenizer.vocabulary_size
    (phase,) = abstract_phases(Config(config.to_dict()), jax.devices())
    with jax.set_mesh(setup.mesh), nn.logical_axis_rules(rule_items()):
        with closing(phase_batches(setup, setup.phases[0], 0)) as batches:
            batch = to_global(next(batches), setup.mesh)
        real = setup.phases[0].step.lower(setup.phases[0].abstract, batch)
    assert phase.lowered().as_text() == real.as_text()


def test_what_was_compiled_ahead_is_not_compiled_when_it_is_called(caplog):
    off = {f"objectives__{name}__weight": 0.0 for name in ("captioning", "matching")}
    config = Config(tiny.config_dict(**off).to_dict())
    task = build_task(config, tiny.tokenizer())
    mesh = make_mesh(config.mesh, jax.devices())
    make_state, (phase,) = plan(config, task, mesh, stand_in_data(config))
    step = StepAhead(phase).step_of(phase)
    batch = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch_shapes(phase.rows, phase.batch_size)
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        state = phase.enter(make_state())
        with jax.log_compiles():
            state, told = step(state, to_global(batch, mesh))
            assert program_text(phase).startswith("HloModule jit_step")
    assert int(state.step) == 1 and "Compiling jit(step)" not in caplog.text
    with jax.log_compiles():
        replace(phase, ema_decay=0.5).lowered()  # another step: it is told where one is compiled
    assert "Compiling jit(step)" in caplog.text


def test_a_start_compiles_its_state_ahead_and_keeps_its_tokenizer(tmp_path, monkeypatch, caplog):
    off = {f"objectives__{name}__weight": 0.0 for name in ("captioning", "matching")}
    config = tiny.config_dict(**off)
    config.data.dir = str(tiny.write_coco(tmp_path / "coco"))
    config.data.cache_dir = str(tmp_path / "cache")
    config = Config(config.to_dict())
    monkeypatch.setattr("unified_mm.training.setup.may_compile_beside", lambda mesh: True)
    compilation = Mock(side_effect=Compilation)
    monkeypatch.setattr("unified_mm.training.setup.Compilation", compilation)
    begin = partial(prepare, config, RunFolder(tmp_path / "run"), lambda _: None)
    with jax.log_compiles():
        setup = begin(ahead=True)
    with jax.set_mesh(setup.mesh), nn.logical_axis_rules(rule_items()), jax.log_compiles():
        state = setup.make_state()
    assert compilation.call_count == 1 and int(state.step) == 0
    assert caplog.text.count("Compiling jit(make)") == 1
    monkeypatch.setattr(TextTokenizer, "train", None)  # the one that was trained is taken
    again = begin()
    assert again.task.tokenizer.as_json() == setup.task.tokenizer.as_json()
    assert compilation.call_count == 1  # a state is not asked for at once


def test_a_cpu_compiles_a_step_at_the_second_level_unless_it_is_to_optimise_little():
    assert compiler_options("gpu") is None and compiler_options("cpu") is None  # as tests run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.config, "read", lambda name: False)
        told = compiler_options("cpu")
    for options in (told, compiled_for_once()):  # versions of jax differ in what there is
        lowered = jax.jit(lambda x: x + 1).lower(1.0)
        assert lowered.compile(compiler_options=options)(1.0) == 2.0
    assert told["xla_backend_optimization_level"] == 2


def test_the_first_parameters_are_traced_once(monkeypatch):
    """For their shapes, and not again for the program that makes them."""
    traced = Mock(side_effect=Task.init)
    monkeypatch.setattr(Task, "init", lambda task, key: traced(task, key))
    config = Config(tiny.config_dict().to_dict())
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    make_state, _ = plan(config, build_task(config, tiny.tokenizer()), mesh, stand_in_data(config))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        make_state.lower()
    assert traced.call_count == 1


def test_a_step_is_traced_once(monkeypatch):
    """For the line that says what computes attention, and not again for the compiler."""
    traced = Mock(side_effect=Task.metrics)
    monkeypatch.setattr(
        Task, "metrics", lambda task, *given, **named: traced(task, *given, **named)
    )
    (phase,) = planned()
    assert attention_line([phase]).startswith("attention: xla for ")
    phase.lowered()
    assert traced.call_count == 1


def test_every_gradient_has_the_layout_of_its_parameter():
    (phase,) = planned()
    asked = [
        each.outvars[0].aval.shape
        for each in equations(phase.traced().jaxpr.jaxpr)
        if each.primitive.name == "layout_constraint"
    ]
    assert sorted(asked) == sorted(leaf.shape for leaf in jax.tree.leaves(phase.abstract.params))


def test_what_the_compiler_says_is_raised_where_the_step_is_asked_for(monkeypatch):
    def full(*_):
        raise ValueError("there is no memory")

    monkeypatch.setattr(Phase, "lowered", lambda _: SimpleNamespace(compile=full))
    (phase,) = planned()
    with pytest.raises(ValueError, match="no memory"):
        StepAhead(phase).step_of(phase)
    StepAhead(None).wait()


def test_bytes_of_a_device_are_its_share(facts):
    phase, _, told = facts
    whole = 4 * told["parameters"]
    assert whole / 8 <= told["parameter_bytes"] <= 1.1 * whole / 8
    assert 2 * whole / 8 <= told["optimizer_bytes"] <= 1.1 * 2 * whole / 8
    assert told["peak_bytes"] > told["temporary_bytes"] > 0
    assert shard_bytes(phase.abstract.params) == told["parameter_bytes"]


def test_the_estimate_follows_from_what_the_program_does(facts):
    _, chip, told = facts
    assert set(told["collectives"]) >= {"all-gather", "all-reduce"}
    sent = sum(total["sent"] for total in told["collectives"].values())
    parts = (told["flops"] / 8 / 1e9, told["traffic_bytes"] / 1e9, sent / 1e9)
    seconds = (told["compute_seconds"], told["memory_seconds"], told["collective_seconds"])
    assert seconds == pytest.approx(parts, rel=1e-9)
    assert told["step_seconds"] == max(parts)
    assert told["mfu"] == pytest.approx(told["flops"] / (8 * 1e9 * max(parts)))
    assert "FLOPs a step" in "\n".join(lines(told))


def test_parameters_are_gathered_and_gradients_are_not(facts):
    told = facts[2]
    assert 0 < told["collectives"]["all-gather"]["bytes"] < 4 * told["parameters"]


def test_what_does_not_fit_says_by_how_much_and_what_to_change(facts, monkeypatch):
    phase, chip, told = facts
    assert not told["fits"]
    over = told["peak_bytes"] - chip.memory
    assert f"{over:,} too few" in told["problem"]
    for hint in ("model.remat=full", "train.batch_size", "model.dtype=bfloat16"):
        assert hint in told["problem"]
    assert "mesh.fsdp" not in told["problem"]  # the state has room
    assert "mesh.fsdp" in problem(told | {"memory_bytes": 2**17})

    def refuse(phase):
        raise DoesNotFit("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded by 4.75G.")

    monkeypatch.setattr(estimating, "compile_step", refuse)
    refused = estimate(phase, CHIPS["v5e"])
    assert not refused["fits"]
    assert refused["peak_bytes"] == int(20.5 * 2**30)
    assert f"{int(4.75 * 2**30):,} too few" in refused["problem"]
    assert refused["step_seconds"] is None and lines(refused)


def test_without_a_known_chip_there_is_no_estimate_of_time(facts):
    told = facts[2]
    assert "seconds" in "\n".join(lines(told))
    assert "seconds" not in "\n".join(lines(told | {"step_seconds": None, "memory_bytes": None}))


def test_flops_that_are_computed_again_are_no_flops_of_the_model():
    (plain,) = planned()
    (again,) = planned(model__remat="full")
    model = training_flops(again)
    assert computed_flops(plain) == model
    assert 1.1 < computed_flops(again) / model < 4 / 3


@pytest.mark.parametrize("size, parameters, layers, width", [
    ("10b", 10_252_006_401, 32, 5120), ("70b", 71_170_007_041, 88, 8192),
])  # fmt: skip
def test_shapes_of_pods_cost_nothing_to_plan(size, parameters, layers, width):
    began = time.perf_counter()
    (phase,) = abstract_phases(recipe(f"coco.py:{size}"), jax.devices())
    assert batch_shapes(phase.rows, 4096)["image"]["pixels"].shape == (4096, 224, 224, 3)
    assert time.perf_counter() - began < 60
    assert sum(parameter_counts(phase.abstract.params).values()) == parameters
    assert parameters == pytest.approx(12 * layers * width**2, rel=0.03)
    assert shard_bytes(phase.abstract.params) == pytest.approx(4 * parameters / 8, rel=0.01)


RECIPES = [
    pytest.param(
        f"{path.name}:{size}",
        marks=() if (path.stem, size) == ("coco_flamingo", "tiny") else pytest.mark.slow,
    )
    for path in sorted(CONFIGS.glob("coco*.py"))
    for size in ("tiny", "base", "large")
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_phase_of_a_recipe_can_be_planned(name):
    config = recipe(name)
    # Experts weigh what they put out in float32, also of bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        names = [phase.name for phase in abstract_phases(config, jax.devices())]
    assert names == (list(config.train.phases) or ["all"])


@pytest.mark.parametrize("changes, message", [
    ({"mesh__tensor": 3}, "asks for 3 devices or a multiple"),
    ({"mesh__data": 1, "mesh__fsdp": 8, "train__batch_size": 12}, "train.batch_size=12 is not div"),
    ({"mesh__tensor": 8}, "not divided by mesh.tensor=8"),
])  # fmt: skip
def test_a_mesh_that_does_not_divide_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        planned(**changes)


@pytest.mark.topology
@pytest.mark.parametrize("mesh", [{"fsdp": 16}, {"data": 4, "fsdp": 2, "tensor": 2}])
def test_a_step_for_sixteen_chips(mesh):
    """A small model on v5e 4x4: memory is divided, and the collectives are those of the scheme."""
    devices, chip = target("v5e:4x4")
    config = tiny.config_dict(
        model__width=256, model__heads=4, model__feed_forward=1024, model__dtype="bfloat16",
        data__vocabulary_size=512, train__batch_size=64, objectives__matching__weight=0.0,
    )  # fmt: skip
    config.mesh.update({"data": 1, **mesh})
    (phase,) = abstract_phases(Config(config.to_dict()), devices)
    told = estimate(phase, chip)
    assert told["chips"] == 16 and told["fits"]
    shards = mesh["fsdp"] * mesh.get("tensor", 1)
    assert told["parameter_bytes"] <= 1.1 * 4 * told["parameters"] / shards
    assert 0 < told["peak_bytes"] < 2**30
    found = told["collectives"]
    # Parameters are gathered for use, and their gradients added up and divided.
    assert found["all-gather"]["bytes"] >= 2 * told["parameters"] / mesh.get("tensor", 1)
    assert "all-reduce" in found or "reduce-scatter" in found
    assert 0 < told["step_seconds"] < 1
    assert 0 < told["mfu"] < 1


def test_nothing_is_compiled_ahead_on_several_devices_of_one_cpu():
    def asked(devices):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
        setup = Mock(spec=Setup, mesh=mesh, options=tiny.config_dict(train__steps=2))
        setup.phase_at.return_value = Mock(spec=Phase)
        found = first_phase(setup, Mock(spec=Checkpoints, steps=lambda: []))
        return found is setup.phase_at.return_value

    assert asked(1) and not asked(2)
