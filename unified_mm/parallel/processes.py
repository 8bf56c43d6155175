"""Several processes as one run: how they start, wait for one another, agree, and end.

`jax.distributed` is what connects them. A process that dies is noticed by it: the others end with
an error, at once where they wait for the dead one's numbers over TCP (CPU devices) or where process
0 died, else when it has sent no heartbeat for `heartbeat_timeout` seconds.

In a run of one process everything here is immediate.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from unified_mm.parallel.sharding import BATCH

_SLOWEST_WORK = 24 * 3600  # seconds that one process may take over what the others wait for
_LAST_WORK = 600  # ... over what comes after the last score: report and result
_GOODBYE = 10  # seconds that a process waits for the others when it ends with an error
_JAX_LATER = 30  # seconds; jax gives up later than we do, for it ends the process without a word


@dataclass(frozen=True)
class Cluster:
    """Where the processes of a run find each other.

    Attributes:
      coordinator: host:port at which process 0 can be reached by all.
      processes, process: how many there are, and which of them this is, from 0.
      method: '' where the three above say it all; 'auto' asks whatever runs this process (Slurm,
        Open MPI, Kubernetes, the TPU's own metadata), or one of these by jax's name for it.
      start_timeout: seconds until all must have met.
      heartbeat_timeout: seconds after which a silent process counts as dead.

    Raises:
      ValueError: what cannot be, named by its flag.
    """

    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    method: str = ""
    start_timeout: int = 300
    heartbeat_timeout: int = 100

    def __post_init__(self) -> None:
        given = {
            "coordinator": self.coordinator or None,
            "processes": self.processes,
            "process": self.process,
        }
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if self.method and len(missing) < 3:
            there = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
            raise ValueError(f"--distributed={self.method} finds out by itself what {there} says")
        if not self.method:
            if missing:
                raise ValueError(f"several processes need {', '.join(missing)} too")
            self._check_place()
        for name in ("start_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1 second")

    def _check_place(self) -> None:
        assert self.processes is not None and self.process is not None
        if self.processes < 1:
            raise ValueError(f"--processes={self.processes}: must be at least 1")
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"--process={self.process}: with --processes={self.processes} it is from 0 to "
                f"{self.processes - 1}"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator={self.coordinator!r} is no host:port, such as 10.0.0.1:8476"
            )


def start(cluster: Cluster) -> None:
    """Connects this process with the others; to be called before any device is used.

    Ends the process with an error that says what to check where they have not all met within
    `start_timeout` seconds.

    Raises:
      ValueError: the place is taken, or nothing says where the others are.
    """
    # Its sync point is never reached in a run that goes on from a step: `training.signals` agrees
    # on stopping in its stead.
    jax.config.update("jax_enable_preemption_service", False)
    named = cluster.method not in ("", "auto")
    with _giving_up_after(cluster.start_timeout, _why_not_met(cluster)):
        try:
            jax.distributed.initialize(
                cluster.coordinator or None,
                cluster.processes,
                cluster.process,
                cluster_detection_method=cluster.method if named else None,
                initialization_timeout=cluster.start_timeout + _JAX_LATER,
                heartbeat_timeout_seconds=cluster.heartbeat_timeout,
            )
        except (ValueError, RuntimeError, ImportError) as error:
            said = str(error).splitlines()[0]
            if cluster.method:
                raise ValueError(
                    f"--distributed={cluster.method}: nothing here tells of other processes "
                    f"({said}); start it under Slurm, Open MPI, Kubernetes or on a TPU, or give "
                    "--coordinator, --processes and --process"
                ) from error
            raise ValueError(
                f"--coordinator={cluster.coordinator}: process {cluster.process} cannot connect "
                f"({said}); is the port free on the host of process 0?"
            ) from error
    if jax.default_backend() == "cpu":
        # Messages between CPU devices bear no name, so all devices must send them in one order, and
        # a program that comes from the compilation cache has another than one just compiled.
        jax.config.update("jax_enable_compilation_cache", False)


def _why_not_met(cluster: Cluster) -> str:
    place = "they were told" if cluster.method else cluster.coordinator
    count = cluster.processes or "the"
    return (
        f"error: {cluster.start_timeout} seconds (--start_timeout) have passed and not all of "
        f"{count} processes have met at {place}. Check that each was started, with a --process of "
        "its own and the same --coordinator; that this is an address of the host of process 0; "
        "that no firewall closes its port; and that the others' logs tell of no error"
    )


@contextmanager
def _giving_up_after(seconds: float, message: str) -> Iterator[None]:
    """Ends this process, which hangs in a call that cannot be interrupted, with a message."""

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_first() -> bool:
    """Whether this is the process that writes what is to be written once."""
    return jax.process_index() == 0


def wait_for_all(what: str, seconds: int = _SLOWEST_WORK) -> None:
    """Returns once every process is here; `what` names the place.

    Raises:
      RuntimeError: some are not, after `seconds`; or one has died.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    get_barrier_sync_fn()(key=what, timeout_ms=seconds * 1000)


@contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Process 0 does what is within, then the others do, who find what it left in a cache.

    Where it fails the others have their turn all the same, and fail likewise.
    """
    if not is_first():
        wait_for_all(what)
    try:
        yield
    finally:
        if is_first():
            wait_for_all(what)


def first_decides(value: bool) -> bool:
    """What process 0 says, on all; for what they would read from a disk at different times."""
    if jax.process_count() == 1:
        return value
    wait_for_all("decision")
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def connect(mesh: Mesh) -> None:
    """Opens the connections that programs on this mesh use between CPU devices.

    They are made where a group of devices first meets, and a device that meets nobody within 30
    seconds fails: no process may still be compiling then. Other devices need no such care.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    everyone = P(mesh.axis_names)
    count = len(NamedSharding(mesh, everyone).addressable_devices)
    ones = jax.make_array_from_process_local_data(
        NamedSharding(mesh, everyone), np.ones(count, np.float32)
    )
    long_axes = [axis for axis, size in mesh.shape.items() if size > 1]
    for number in range(1, len(long_axes) + 1):
        for axes in itertools.combinations(long_axes, number):
            add = partial(jax.lax.psum, axis_name=axes)
            along = jax.shard_map(
                add, mesh=mesh, in_specs=everyone, out_specs=everyone, check_vma=False
            )
            compiled = jax.jit(along).lower(ones).compile()
            wait_for_all(f"connecting along {axes}")
            jax.block_until_ready(compiled(ones))


def refuse_unequal(what: str, text: str) -> None:
    """Raises ValueError on every process unless `text` is the same on all; `what` names it."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode(errors="surrogatepass")).digest(), np.uint8)
    wait_for_all(what)
    all_of_them = multihost_utils.process_allgather(digest)
    other = np.flatnonzero((all_of_them != all_of_them[0]).any(1))
    if other.size:
        raise ValueError(
            f"{what} is not the same on all processes: {', '.join(map(str, other[:10].tolist()))} "
            "differ from process 0. Give each the same command, code and data, and a --workdir "
            "that all of them share"
        )


def together(work: Callable[[], int]) -> int:
    """The exit code of `work`, returned once every process has done its own.

    Where one fails, the others cannot go on: what failed is printed and, unless all end within 10
    seconds, this process ends at once, so that they notice.
    """
    try:
        code = work()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on (see "
            "above; where another one died, its own log says why). The same commands go on from "
            "the last whole checkpoint, with any number of processes",
            file=sys.stderr,
        )
        code = 1
    if jax.distributed.is_initialized():
        _end_with_others(code)
    return code


def _end_with_others(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        wait_for_all("end", _GOODBYE if code else _LAST_WORK)
    except Exception:
        os._exit(code or 1)  # jax would wait for them, then abort
    jax.distributed.shutdown()


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
