"""From logical axes to shardings, and what is refused on the way."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import (
    path_of,
    shardings_like,
    shardings_of,
    to_global,
    without_names,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def named(sizes, *names):
    return nn.LogicallyPartitioned(shape(*sizes), names)


def test_the_table_is_followed_and_scalars_are_everywhere(mesh):
    tree = {
        "kernel": named((3, 4, 8, 5), "layers", "embed", "heads", None),
        "table": named((6, 4), "vocabulary", "embed"),
        "scale": shape(),
    }
    found = shardings_of(tree, mesh)
    expected = {
        "kernel": P("stage", "fsdp", "tensor", None),
        "table": P(("stage", "tensor"), "fsdp"),
        "scale": P(),
    }
    assert found == {name: NamedSharding(mesh, spec) for name, spec in expected.items()}
    assert without_names(tree)["table"] == shape(6, 4)


@pytest.mark.parametrize(
    "leaf, message",
    [
        (
            named((4, 5), "embed", "heads"),
            r"block/w: axis 'heads' of size 5 is not divided by "
            r"mesh.tensor=2; choose another mesh or another size",
        ),
        (named((4, 4), "embed", "head"), "block/w: no rule covers axis 'head'; there are"),
        (shape(4, 4), r"block/w: an array of shape \(4, 4\) has no axis names"),
    ],
)
def test_errors_name_the_parameter_and_the_axis(mesh, leaf, message):
    with pytest.raises(ValueError, match=message):
        shardings_of({"block": {"w": leaf}}, mesh)


def test_copies_of_parameters_lie_as_they_do(mesh):
    """By path and shape: what only looks alike, or is another shape, is replicated."""
    params = {"a": {"w": shape(4, 4)}, "b": {"w": shape(4, 4)}}
    shardings = {
        "a": {"w": NamedSharding(mesh, P("fsdp"))},
        "b": {"w": NamedSharding(mesh, P("tensor"))},
    }
    everywhere = NamedSharding(mesh, P())
    state = {"mu": params, "nu": {"a": {"w": shape(4)}}, "count": shape(), "w": shape(4, 4)}
    found = shardings_like(params, shardings, state, everywhere)
    assert found["mu"] == shardings
    assert found["nu"]["a"]["w"] == found["count"] == found["w"] == everywhere


def test_rows_of_a_batch_go_to_the_devices_in_order(mesh):
    rows = {"x": np.arange(8 * 3).reshape(8, 3)}
    found = to_global(rows, mesh)["x"]
    np.testing.assert_array_equal(found, rows["x"])
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 3)}
    tree = {"x": {"y": [shape(1)]}}
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree)
    assert path_of(path).startswith("x/y/")
