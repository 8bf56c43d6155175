"""The same step on eight devices, however they are arranged, and memory that really is divided.

The gradient is read back from Adam's first moment after one step, so what is compared is the
program that trains and no look-alike.
"""

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.config import Config
from unified_mm.costs.collectives import collectives_of
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.tokens import Group, single_document
from unified_mm.nn.transformer import Transformer
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import (
    param_shardings,
    path_of,
    rule_items,
    to_global,
    without_names,
)
from unified_mm.task import build_task
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.state import initial_state, state_of_phase
from unified_mm.training.step import gradients, make_train_step

FUSIONS = {
    "early": {},
    "gated_cross_attention": {
        "objectives__matching__weight": 0.0,
        "model__cross__start": 0.3,  # open gates, or nothing behind them would have a gradient
        "model__resampler__latents": 4,
        "model__resampler__head_width": 8,
        "model__resampler__feed_forward": 64,
    },
    "late": {"objectives__matching__weight": 0.0, "objectives__captioning__weight": 0.0},
}
MESHES = {
    "data=8": {"data": 8},
    "data=2 sequence=4": {"data": 2, "sequence": 4},
    "data=2 stage=4": {"data": 2, "stage": 4},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp=2 sequence=2 tensor=2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "data=2 fsdp=2 stage=2": {"data": 2, "fsdp": 2, "stage": 2},
    "fsdp=2 tensor=2 stage=2": {"fsdp": 2, "tensor": 2, "stage": 2},
    "fsdp=8 zero=2": {"fsdp": 8, "zero": 2},
    "fsdp=8 zero=1": {"fsdp": 8, "zero": 1},
}
FAST = ("late", "fsdp=2 tensor=2 stage=2")  # the rest is minutes of compilation
# Each axis with each fusion; what is of no fusion with the one that compiles soonest.
MIXED = ("data=2 fsdp=2 tensor=2", "fsdp=2 sequence=2 tensor=2", "data=2 fsdp=2 stage=2")
CASES = [
    FAST,
    *(("late", name) for name in MESHES if name not in (FAST[1], *MIXED)),
    *((fusion, name) for fusion in ("early", "gated_cross_attention") for name in MIXED),
]
ROWS, WIDTH = 8, 64
IMAGE, TEXT = 16, 12  # tokens


@functools.cache
def config(fusion):
    return Config(
        tiny.config_dict(
            model__fusion=fusion,
            model__width=WIDTH,
            model__layers=4,
            model__heads=4,
            model__feed_forward=256,
            model__modalities__image__patch=4,
            train__warmup_steps=0,
            train__clip_norm=1e9,
            **FUSIONS[fusion],
        ).to_dict()
    )


@functools.cache
def task(fusion):
    # A vocabulary that four devices divide.
    return build_task(config(fusion), TextTokenizer.train(tiny.TEXTS, 264))


def host_batch(fusion):
    batch = jax.tree.map(np.array, tiny.batch(task(fusion), ROWS))
    batch["image"]["present"][3] = False  # so that devices hold unequal shares of what is scored
    batch["text"]["prompted"][5] = True
    return batch


@contextlib.contextmanager
def on(mesh):
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        yield


def first_state(fusion, mesh, zero=3):
    placement = param_shardings(task(fusion).abstract_params(), mesh, zero)
    make, shapes = initial_state(task(fusion).init, placement, 0, averaged=True)
    optimizer = make_optimizer(config(fusion).train, 4, shapes.params)
    abstract, enter = state_of_phase(shapes, optimizer, placement)
    return lambda: enter(make()), abstract, optimizer, placement


@functools.cache
def alone(fusion):
    """One device: parameters, loss and gradient."""
    mesh = make_mesh({}, jax.devices()[:1])
    with on(mesh):
        make, _, optimizer, _ = first_state(fusion, mesh)
        state = make()
        key = jax.random.fold_in(state.key, 0)
        loss, gradient, _ = jax.jit(lambda p, b: gradients(task(fusion), optimizer, p, b, key, 1))(
            state.params, to_global(host_batch(fusion), mesh)
        )
    return jax.device_get((state.params, loss, gradient))


@dataclass(frozen=True)
class Stepped:
    """Eight devices: the first state, the next one, what the step told, its compiled text."""

    fusion: str
    name: str
    mesh: Any
    zero: int
    before: Any
    params: Any
    after: Any
    measured: Any
    text: str


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, marks=() if case == FAST else pytest.mark.slow, id=", ".join(case))
        for case in CASES
    ],
)
def stepped(request):
    fusion, name = request.param
    sizes = dict(MESHES[name])
    zero = sizes.pop("zero", 3)
    mesh = make_mesh(sizes)
    trained = task(fusion)
    if mesh.shape["stage"] > 1:
        trained = tiny.replace_model(trained, pipeline=Pipeline(mesh.shape["stage"], 2))
    with on(mesh):
        make, abstract, optimizer, placement = first_state(fusion, mesh, zero)
        state = make()
        batch = to_global(host_batch(fusion), mesh)
        step = make_train_step(trained, optimizer, placement, abstract, ema_decay=0.5)
        compiled = step.lower(state, batch).compile()
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        params = jax.device_get(state.params)
        after, measured = compiled(state, batch)
    told = jax.device_get(measured)
    return Stepped(fusion, name, mesh, zero, before, params, after, told, compiled.as_text())


def bytes_on_a_device(leaf):
    """Of the device that holds most."""
    return max(shard.data.nbytes for shard in leaf.addressable_shards)


def leaves(tree, is_leaf=None):
    return {
        path_of(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    }


def moments(optimizer_state, which):
    """Adam's moments by the path of their parameter."""
    found = {}
    for path, leaf in leaves(optimizer_state).items():
        if f"/{which}/" in path:
            name = path.split(f"/{which}/")[1]
            assert name not in found
            found[name] = leaf
    return found


def test_loss_and_gradients_are_those_of_one_device(stepped):
    alone_params, loss, gradient = alone(stepped.fusion)
    # The same draws; the compiler rounds them by their layout.
    for drawn, expected in zip(
        jax.tree.leaves(stepped.params), jax.tree.leaves(alone_params), strict=True
    ):
        np.testing.assert_array_max_ulp(drawn, expected, maxulp=4)
    assert float(stepped.measured.metrics["loss"][0]) == pytest.approx(float(loss), rel=1e-5)
    total = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    mu = moments(stepped.after.optimizer, "mu")
    assert set(mu) == set(leaves(gradient))
    for path, expected in leaves(gradient).items():
        found = np.asarray(mu[path]) / (1 - config(stepped.fusion).train.b1)
        # The key's bias moves no softmax, so its gradient is rounding and nothing else.
        size = max(np.linalg.norm(expected), 1e-2 * total)
        assert np.linalg.norm(found - expected) <= 1e-5 * size, path


def expected_spec(path, ndim):
    """The table of axes, written out by hand: where each kind of parameter is cut."""
    fsdp, tensor, stage = "fsdp", "tensor", "stage"
    # Outside the stacks the width is divided by all that divides nothing else.
    spread, with_heads = (fsdp, stage, tensor), (fsdp, stage)
    stack = "(transformer|towers_image)"
    block = rf"{stack}/layers/block_0"
    cross = "transformer/layers/cross"
    resampler = "resamplers_image"
    table = {
        rf"{block}/attention/(query|key|value)/shared/kernel": (stage, fsdp, tensor, None),
        rf"{block}/attention/(query|key|value)/shared/bias": (stage, tensor, None),
        rf"{block}/attention/output/shared/kernel": (stage, tensor, None, fsdp),
        rf"{block}/attention/output/shared/bias": (stage, fsdp),
        rf"{block}/feed_forward/mlp/shared/up/kernel": (stage, fsdp, tensor),
        rf"{block}/feed_forward/mlp/shared/up/bias": (stage, tensor),
        rf"{block}/feed_forward/mlp/shared/down/kernel": (stage, tensor, fsdp),
        rf"{block}/feed_forward/mlp/shared/down/bias": (stage, fsdp),
        rf"{block}/(attention|feed_forward)_norm/(scale|bias)": (stage, fsdp),
        rf"{cross}/attention/(query|key|value)/kernel": (stage, fsdp, tensor, None),
        rf"{cross}/attention/output/kernel": (stage, tensor, None, fsdp),
        rf"{cross}/feed_forward/up/kernel": (stage, fsdp, tensor),
        rf"{cross}/feed_forward/down/kernel": (stage, tensor, fsdp),
        rf"{cross}/(attention|feed_forward)_gate": (stage, None),
        rf"{cross}/(attention|feed_forward)_norm/(scale|bias)": (stage, fsdp),
        rf"{resampler}/attention_\d/(query|key|value)/kernel": (with_heads, tensor, None),
        rf"{resampler}/attention_\d/output/kernel": (tensor, None, with_heads),
        rf"{resampler}/feed_forward_\d/up/kernel": (with_heads, tensor),
        rf"{resampler}/feed_forward_\d/down/kernel": (tensor, with_heads),
        rf"{resampler}/(.*norm.*/(scale|bias))": (spread,),
        rf"{resampler}/(latents|times)": (None, spread),
        rf"{stack}/norm/(scale|bias)": (spread,),
        r"embedders_text/tokens": ((stage, tensor), fsdp),
        r"embedders_text/positions": (None, spread),
        r"embedders_image/positions": (None, None, spread),
        r"embedders_image/patches/kernel": (None, spread),
        r"embedders_image/patches/bias": (spread,),
        r"embedders_(image|text)/modality": (spread,),
        r"heads_contrastive/project_(image|text)/kernel": (spread, None),
        r"heads_contrastive/log_scale": (),
        r"heads_matching/score/kernel": (spread, None),
        r"heads_matching/score/bias": (None,),
    }
    found = [spec for pattern, spec in table.items() if re.fullmatch(pattern, path)]
    assert len(found) == 1 and len(found[0]) == ndim, f"{path} ({ndim} axes): {found}"
    return found[0]


def without_fsdp(axes):
    """The mesh axes of an array's axis where `fsdp` does not divide it."""
    names = axes if isinstance(axes, tuple) else (axes,)
    return tuple(name for name in names if name not in ("fsdp", None))


def test_every_parameter_and_moment_lies_where_the_table_says(stepped):
    mesh, after = stepped.mesh, stepped.after
    now = jax.tree.map(lambda x: x.sharding, after)
    for path, leaf in leaves(after.params).items():
        axes = expected_spec(path, leaf.ndim)
        divided = NamedSharding(mesh, P(*axes))
        whole = NamedSharding(mesh, P(*map(without_fsdp, axes)))
        own = divided if stepped.zero == 3 else whole
        for state in (stepped.before, now):
            assert leaves(state.params)[path].is_equivalent_to(own, leaf.ndim), path
            copies = [
                leaves(state.average)[path],
                moments(state.optimizer, "mu")[path],
                moments(state.optimizer, "nu")[path],
            ]
            for copy in copies:
                assert copy.is_equivalent_to(divided, leaf.ndim), (path, copy, divided)


def test_memory_is_divided_by_the_devices_that_share_it(stepped):
    shape, after = stepped.mesh.shape, stepped.after
    shards = shape["fsdp"] * shape["tensor"] * shape["stage"]
    own = shards if stepped.zero == 3 else shards // shape["fsdp"]
    for tree, parts in ((after.params, own), (after.optimizer, shards), (after.average, shards)):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        on_one = sum(bytes_on_a_device(leaf) for leaf in jax.tree.leaves(tree))
        assert on_one <= 1.1 * whole / parts


# The collectives that each axis needs for arrays as large as a matrix of parameters. Parameters
# outside the stacks are gathered along whatever else divides them.
NEEDED = {
    "data": {"all-reduce"},  # gradients
    "fsdp": {"all-gather", "all-reduce", "reduce-scatter"},  # parameters; gradients
    "tensor": {"all-reduce", "all-gather"},  # activations
    "sequence": {"all-reduce", "all-to-all"},  # gradients; tokens for heads and back
    "stage": {"all-reduce", "collective-permute", "all-gather"},  # the output; from one to the next
}


def test_the_collectives_are_those_that_the_scheme_needs(stepped):
    """No others as large as the smallest matrix of a layer, and the needed ones are there."""
    there = {axis for axis, size in stepped.mesh.shape.items() if size > 1}
    collectives = collectives_of(stepped.text)
    large = {each.kind for each in collectives if each.bytes > 4 * WIDTH * WIDTH}
    needed = set().union(*(NEEDED[axis] for axis in there))
    if stepped.fusion == "gated_cross_attention" and "sequence" in there:
        needed |= {"all-gather"}  # the resampler looks at all features of a picture
    # Early fusion's matching hands keys and values, no parameters, from one pass to another.
    matching = stepped.fusion == "early"
    if not matching:
        assert large <= needed, [each for each in collectives if each.kind in large - needed]
    total = {}
    for each in collectives:
        total[each.kind] = total.get(each.kind, 0) + each.count * each.bytes
    shape = stepped.mesh.shape
    on_a_device = sum(leaf.nbytes for leaf in jax.tree.leaves(stepped.after.params))
    on_a_device /= shape["tensor"] * shape["stage"]
    if shape["fsdp"] > 1:  # parameters come together (twice where they are kept divided)
        assert total["all-gather"] > 0.9 * on_a_device
    if shape["data"] * shape["fsdp"] > 1:  # gradients are added up
        assert total["all-reduce"] + total.get("reduce-scatter", 0) > 0.9 * on_a_device
    if shape["sequence"] > 1:
        assert total["all-to-all"] > 0
    if shape["stage"] > 1:
        assert total["collective-permute"] > 0
    if there == {"data"} and not matching:
        assert total.get("all-gather", 0) < 0.01 * on_a_device


def test_no_device_ever_holds_the_activations_of_the_whole_batch(stepped):
    if stepped.fusion != "early" or stepped.mesh.shape["data"] * stepped.mesh.shape["fsdp"] < 4:
        pytest.skip("asked of early fusion, where the batch is divided enough to tell")
    shape = stepped.mesh.shape
    own = ROWS // (shape["data"] * shape["fsdp"])
    together = IMAGE + TEXT + TEXT  # the text is read for contrast and for captioning
    assert f"f32[{own},{together},{WIDTH}]" in stepped.text
    for length in (together, IMAGE, TEXT):
        assert f"f32[{ROWS},{length},{WIDTH}]" not in stepped.text
    assert f"f32[{3 * ROWS},{TEXT},{WIDTH}]" not in stepped.text  # matching's pairs


def test_the_constraint_on_activations_is_no_silent_no_op():
    """Replicated inputs come out of the stack divided by rows; without the table they stay."""
    mesh = make_mesh(MESHES["data=2 fsdp=2 tensor=2"])
    group = Group("t", "text", 5)
    metadata = single_document(jnp.ones((ROWS, 5), bool), group)
    options = task("early").model.options
    plan = plan_attention(options, MaskTable((View("t", "joint"),)), metadata, metadata)
    stack = Transformer(options)
    x = jnp.ones((ROWS, 5, WIDTH))
    params = without_names(stack.init(jax.random.key(0), x, plan))

    def read(params, x):
        return stack.apply(params, x, plan)[0]

    with jax.set_mesh(mesh):
        params, x = jax.device_put((params, x), NamedSharding(mesh, P()))
        assert jax.jit(read)(params, x).sharding.is_fully_replicated
        with nn.logical_axis_rules(rule_items()):
            divided = jax.jit(lambda params, x: read(params, x))(params, x)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    assert divided.sharding.is_equivalent_to(rows, 3)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"tensor": 8}, "axis 'heads' of size 4 is not divided by mesh.tensor=8"),
        ({"stage": 8}, "axis 'layers' of size 4 is not divided by mesh.stage=8"),
        ({"sequence": 8}, r"axis 'attending_heads' of size 4 is not divided by mesh.sequence=8"),
        ({"sequence": 4, "tensor": 2}, "not divided by mesh.sequence=4, mesh.tensor=2"),
        ({"fsdp": 8}, "axis 'batch' of size 4 is not divided by mesh.data=1, mesh.fsdp=8"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_names_the_dimension(sizes, named):
    mesh = make_mesh(sizes)
    late = task("late")
    with on(mesh), pytest.raises(ValueError, match=named):
        params = param_shardings(late.abstract_params(), mesh)
        batch = jax.tree.map(lambda x: x[:4], tiny.batch(late, ROWS))
        jax.eval_shape(
            functools.partial(late.metrics, deterministic=True),
            without_names(late.abstract_params()),
            batch,
            jax.random.key(0),
        )
        del params
