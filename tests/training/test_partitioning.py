"""The same step on eight devices, however they are arranged, and memory that really is divided.

The gradient is read back from Adam's first moment after one step, so what is compared is the
program that trains and no look-alike.
"""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.config import Config
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.modalities.tokens import Group, single_document
from unified_mm.models.attention import plan_attention
from unified_mm.models.masks import Stream, Visibility
from unified_mm.models.transformer import Transformer
from unified_mm.objectives.task import build_task
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import path_of, rule_items, to_global, without_names
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.state import initial_state, state_of_phase
from unified_mm.training.step import gradients, make_train_step

MESHES = {
    "data=8": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp=8": {"data": 1, "fsdp": 8, "tensor": 1},
    "data=4 tensor=2": {"data": 4, "fsdp": 1, "tensor": 2},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
SLOW = ("data=8", "data=4 tensor=2")
ROWS, WIDTH = 8, 64
IMAGE, TEXT = 16, 12  # tokens


@functools.cache
def config():
    return Config(
        tiny.config_dict(
            model__width=WIDTH,
            model__heads=4,
            model__feed_forward=256,
            model__modalities__image__patch=4,
            train__warmup_steps=0,
            train__clip_norm=1e9,
        ).to_dict()
    )


@functools.cache
def task():
    # A vocabulary that two devices divide.
    return build_task(config(), TextTokenizer.train(tiny.TEXTS, 264))


def host_batch():
    batch = jax.tree.map(np.array, tiny.batch(task(), ROWS))
    batch["image"]["present"][3] = False  # so that devices hold unequal shares of what is scored
    batch["text"]["prompted"][5] = True
    return batch


@contextlib.contextmanager
def on(mesh):
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        yield


def first_state(mesh):
    make, shapes = initial_state(task().init, mesh, 0, averaged=True)
    optimizer = make_optimizer(config().train, 4, shapes.params)
    abstract, enter = state_of_phase(shapes, optimizer, mesh)
    return lambda: enter(make()), abstract, optimizer


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The sharding is the compiler's first work; what it does for speed is only waited for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def alone(quick_compilation):
    """One device: parameters, loss and gradient."""
    mesh = make_mesh(MESHES["data=8"] | {"data": 1}, jax.devices()[:1])
    with on(mesh):
        make, _, optimizer = first_state(mesh)
        state = make()
        key = jax.random.fold_in(state.key, 0)
        loss, gradient, _ = jax.jit(lambda p, b: gradients(task(), optimizer, p, b, key, 1))(
            state.params, to_global(host_batch(), mesh)
        )
    return jax.device_get((state.params, loss, gradient))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MESHES
    ],
)
def stepped(request, quick_compilation):
    """Eight devices: the first state, the next one, what the step told, its compiled text."""
    mesh = make_mesh(MESHES[request.param])
    with on(mesh):
        make, abstract, optimizer = first_state(mesh)
        state = make()
        batch = to_global(host_batch(), mesh)
        step = make_train_step(task(), optimizer, mesh, abstract, average_decay=0.5)
        compiled = step.lower(state, batch).compile()
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        params = jax.device_get(state.params)
        after, measured = compiled(state, batch)
    return mesh, before, params, after, jax.device_get(measured), compiled.as_text()


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


def test_loss_and_gradients_are_those_of_one_device(stepped, alone):
    _, _, params, after, measured, _ = stepped
    alone_params, loss, gradient = alone
    jax.tree.map(np.testing.assert_array_equal, params, alone_params)
    assert float(measured.pairs["loss"][0]) == pytest.approx(float(loss), rel=1e-5)
    total = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    mu = moments(after.optimizer, "mu")
    assert set(mu) == set(leaves(gradient))
    for path, expected in leaves(gradient).items():
        found = np.asarray(mu[path]) / (1 - config().train.b1)
        # The key's bias moves no softmax, so its gradient is rounding and nothing else.
        size = max(np.linalg.norm(expected), 1e-2 * total)
        assert np.linalg.norm(found - expected) <= 1e-5 * size, path


def expected_spec(path, ndim):
    """The table of axes, written out by hand: where each kind of parameter is cut."""
    fsdp, tensor = "fsdp", "tensor"
    block = "transformer/layers/block_0"
    table = {
        rf"{block}/attention/(query|key|value)/shared/kernel": (None, fsdp, tensor, None),
        rf"{block}/attention/(query|key|value)/shared/bias": (None, tensor, None),
        rf"{block}/attention/output/shared/kernel": (None, tensor, None, fsdp),
        rf"{block}/attention/output/shared/bias": (None, fsdp),
        rf"{block}/feed_forward/mlp/shared/up/kernel": (None, fsdp, tensor),
        rf"{block}/feed_forward/mlp/shared/up/bias": (None, tensor),
        rf"{block}/feed_forward/mlp/shared/down/kernel": (None, tensor, fsdp),
        rf"{block}/feed_forward/mlp/shared/down/bias": (None, fsdp),
        rf"{block}/(attention|feed_forward)_norm/(scale|bias)": (None, fsdp),
        r"transformer/norm/(scale|bias)": (fsdp,),
        r"embedders_text/tokens": (tensor, fsdp),
        r"embedders_text/positions": (None, fsdp),
        r"embedders_image/positions": (None, None, fsdp),
        r"embedders_image/patches/kernel": (None, fsdp),
        r"embedders_image/patches/bias": (fsdp,),
        r"embedders_(image|text)/modality": (fsdp,),
        r"heads_contrastive/project_(image|text)/kernel": (fsdp, None),
        r"heads_contrastive/log_scale": (),
        r"heads_matching/score/kernel": (fsdp, None),
        r"heads_matching/score/bias": (None,),
    }
    found = [spec for pattern, spec in table.items() if re.fullmatch(pattern, path)]
    assert len(found) == 1 and len(found[0]) == ndim, f"{path} ({ndim} axes): {found}"
    return P(*found[0])


def test_every_parameter_and_moment_lies_where_the_table_says(stepped):
    mesh, before, _, after, _, _ = stepped
    now = jax.tree.map(lambda x: x.sharding, after)
    for path, leaf in leaves(after.params).items():
        expected = NamedSharding(mesh, expected_spec(path, leaf.ndim))
        for state in (before, now):
            copies = [
                leaves(state.params)[path],
                leaves(state.average)[path],
                moments(state.optimizer, "mu")[path],
                moments(state.optimizer, "nu")[path],
            ]
            for copy in copies:
                assert copy.is_equivalent_to(expected, leaf.ndim), (path, copy, expected)


def test_memory_is_divided_by_the_devices_that_share_it(stepped):
    mesh, _, _, after, _, _ = stepped
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for tree in (after.params, after.optimizer, after.average):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        on_one = sum(bytes_on_a_device(leaf) for leaf in jax.tree.leaves(tree))
        assert on_one <= 1.1 * whole / shards


def test_no_device_ever_holds_the_activations_of_the_whole_batch(stepped):
    mesh, *_, text = stepped
    own = ROWS // (mesh.shape["data"] * mesh.shape["fsdp"])
    together = IMAGE + TEXT + TEXT  # the text is read for contrast and for captioning
    assert f"f32[{own},{together},{WIDTH}]" in text
    for length in (together, IMAGE, TEXT):
        assert f"f32[{ROWS},{length},{WIDTH}]" not in text
    assert f"f32[{3 * ROWS},{TEXT},{WIDTH}]" not in text  # matching's right and wrong pairs


def test_the_constraint_on_activations_is_no_silent_no_op():
    """Replicated inputs come out of the stack divided by rows; without the table they stay."""
    mesh = make_mesh(MESHES["data=2 fsdp=2 tensor=2"])
    group = Group("t", "text", 5)
    metadata = single_document(jnp.ones((ROWS, 5), bool), group)
    plan = plan_attention(Visibility((Stream("t", "joint"),)), metadata, metadata)
    stack = Transformer(task().model.options)
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
