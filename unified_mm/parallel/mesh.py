"""The device mesh, which the config alone determines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh with all of `AXES`.

    Args:
      sizes: size of each axis, 1 where it is not named; one size may be -1, which takes the devices
        that are left.
      devices: devices of the mesh, by default all of this run's.

    Raises:
      ValueError: if a size is not allowed, or they do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes[axis]) if axis in sizes else 1 for axis in AXES]
    given = 1
    for size in shape:
        given *= size if size != -1 else 1
    open_axes = shape.count(-1)
    named = [(axis, size) for axis, size in zip(AXES, shape, strict=True) if size != 1]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in named) or "a mesh of 1 device"
    if open_axes > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"{asked}: sizes are at least 1, and one alone may be -1")
    if open_axes and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    elif given != len(devices) or open_axes:
        raise ValueError(
            f"{asked} asks for {given} devices{' or a multiple' if open_axes else ''}; "
            f"this run has {len(devices)}"
        )
    # Unlike `jax.make_mesh` for most TPUs, this may split a physical axis of the torus.
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shares_threads(mesh: Mesh) -> bool:
    """Returns whether a mesh is several devices of one CPU, whose programs share its threads.

    A program in which all devices wait for each other holds a thread for each: beside another one
    that is queued, or a compilation, it may wait for ever.
    """
    return mesh.devices.size > 1 and mesh.devices.flat[0].platform == "cpu"


LESS_AT_ONCE = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def may_stand_still(mesh: Mesh) -> str:
    """Returns what to do where one program alone may wait for its threads for ever; '' where not.

    A device may wait for others in several exchanges at once, and each holds a thread. XLA makes
    as many threads as there are cores or devices: with eight devices on two cores 3 of 12 runs of
    two trainings each stood still, and none of 12 with four threads for each device. Nor are
    threads enough: an exchange within a loop and one beside it may be begun in another order on
    another device, and hold what the other needs. Of 12 trainings with Muon, of 200 to 2,500 steps,
    five stood still, with up to 16 threads for each device, most of them asleep. With operations in
    the order that takes least memory none of three did in 1,500 to 2,450 steps.
    """
    wanted = 4 * mesh.devices.size
    given = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC")
    enough = int(given or os.cpu_count() or 1) >= wanted
    if not shares_threads(mesh) or (enough and LESS_AT_ONCE in os.environ.get("XLA_FLAGS", "")):
        return ""
    return (
        f"{mesh.devices.size} devices share one CPU and may wait for its threads for ever: "
        f"PJRT_NPROC={wanted} XLA_FLAGS='{LESS_AT_ONCE} ...' in the environment, with your other "
        "flags in the place of ..., makes it unlikely"
    )


def platform() -> str:
    """Returns the platform on which programs traced now will run: 'cpu', 'gpu' or 'tpu'.

    It is the platform of the current mesh, whose devices this machine need not have, or else jax's
    default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
