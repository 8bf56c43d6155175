"""Meshes by config alone."""

import jax
import pytest

from unified_mm.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "asked, shape",
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, 8), (1, 1, 8)),
        ((8, 1, -1), (8, 1, 1)),
    ],
)
def test_sizes_and_what_is_left(asked, shape):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), asked, strict=True)))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert {device.id for device in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    "asked, message",
    [
        ((3, 1, 1), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 asks for 3 devices; this machine has"),
        ((-1, 3, 1), "asks for 3 devices or a multiple; this machine has 8"),
        ((-1, -1, 1), "one alone may be -1"),
        ((0, 1, 1), "sizes are at least 1"),
        ((-2, 1, 1), "sizes are at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(dict(zip(("data", "fsdp", "tensor"), asked, strict=True)))


def test_some_of_the_devices():
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 1}, jax.devices()[:2])
    assert mesh.devices.size == 2
