"""Meshes by config alone."""

import os

import jax
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.parallel.mesh import AXES, LESS_AT_ONCE, make_mesh, may_stand_still
from unified_mm.training.layout import in_training


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
    named = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | named
    assert {device.id for device in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    "asked, message",
    [
        ((3, 1, 1), "mesh.data=3 asks for 3 devices; this run has"),
        ((-1, 3, 1), "asks for 3 devices or a multiple; this run has 8"),
        ((-1, -1, 1), "one alone may be -1"),
        ((0, 1, 1), "sizes are at least 1"),
        ((-2, 1, 1), "sizes are at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(dict(zip(("data", "fsdp", "tensor"), asked, strict=True)))


def test_some_of_the_devices():
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    assert mesh.devices.size == 2 and mesh.shape["fsdp"] == 2


def test_sequence_stage_and_expert_are_axes():
    mesh = make_mesh({"data": -1, "sequence": 2, "stage": 2})
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"data": 2, "sequence": 2, "stage": 2}
    mesh = make_mesh({"data": -1, "expert": 4})
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"data": 2, "expert": 4}
    with pytest.raises(ValueError, match="mesh.expert=4: no layer has experts; set mesh.expert=1"):
        in_training(Config(tiny.config_dict().to_dict()), tiny.task(), mesh)
    experts = {"model__feed_forward_type": "experts", "objectives__matching__weight": 0.0}
    for name, value in (("dropless", True), ("drop_text", False)):
        whole = experts | {"model__feed_forward_options": {name: value}}
        why = rf"mesh.expert=4: experts that drop nothing .*{name}={value}"
        with pytest.raises(ValueError, match=why):
            in_training(Config(tiny.config_dict(**whole).to_dict()), tiny.task(**whole), mesh)


def test_devices_of_one_cpu_want_threads(monkeypatch):
    mesh = make_mesh({"data": -1})
    assert may_stand_still(mesh) == ""  # see conftest
    flags = os.environ["XLA_FLAGS"]
    for name, value in (
        ("PJRT_NPROC", str(mesh.devices.size)),
        ("XLA_FLAGS", flags.replace(LESS_AT_ONCE, "")),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            said = may_stand_still(mesh)
            assert f"PJRT_NPROC={4 * mesh.devices.size}" in said and LESS_AT_ONCE in said
            assert may_stand_still(make_mesh({"data": 1}, jax.devices()[:1])) == ""
