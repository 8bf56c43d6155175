"""Which rows of a global batch a process reads: those that its devices hold."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from unified_mm.parallel.sharding import BATCH


def own_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " b"]:
    """The rows of a global batch that this process reads, in ascending order.

    They are what `to_global` takes. Processes whose devices hold the same rows (a tensor axis that
    spans them, say) all read them; otherwise every row is read by one process.

    Raises:
      ValueError: as `rows_by_process` does.
    """
    axes = BATCH[0]
    cut = [mesh.axis_names.index(axis) for axis in axes]
    devices = np.moveaxis(mesh.devices, cut, range(len(cut)))
    shards = devices.reshape(int(np.prod([mesh.shape[axis] for axis in axes])), -1)
    owners = np.array([[device.process_index for device in shard] for shard in shards])
    return rows_by_process(owners, batch_size)[jax.process_index()]


def rows_by_process(
    owners: Int[np.ndarray, "S R"], batch_size: int
) -> dict[int, Int[np.ndarray, " b"]]:
    """The rows that each process holds.

    Args:
      owners: the process of each device; the batch is cut into S equal shards in their order, each
        of which R devices hold.
      batch_size: rows of the global batch.

    Raises:
      ValueError: a batch that S does not divide, or processes that share some of their rows and
        not all: then no process could read its rows alone.
    """
    shards = len(owners)
    if batch_size < 1 or batch_size % shards:
        raise ValueError(
            f"a batch of {batch_size} cannot be split over {shards} groups of devices "
            "(mesh.data x mesh.fsdp): make it a multiple of them"
        )
    rows = np.arange(batch_size).reshape(shards, -1)
    held = {int(p): rows[(owners == p).any(1)].reshape(-1) for p in np.unique(owners)}
    known: dict[int, tuple[int, ...]] = {}
    for process, own in held.items():
        for row in own.tolist():
            if known.setdefault(row, tuple(own.tolist())) != tuple(own.tolist()):
                raise ValueError(
                    f"process {process} would hold some rows of a batch that another process "
                    "holds, but not all of them: choose mesh.data x mesh.fsdp as a multiple or a "
                    "divisor of the number of processes"
                )
    return held
