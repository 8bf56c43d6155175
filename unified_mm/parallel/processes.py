"""Several processes as one run: how they start, wait for one another, agree, and end.

`jax.distributed` connects them, and notices a process that dies: the others end with an error, at
once where they wait for its data over TCP (CPU devices) or where process 0 died, otherwise when it
has sent no heartbeat for `heartbeat_timeout` seconds.

In a run of one process nothing here waits.

The same command runs once a process, with `--coordinator=HOST:PORT --processes=N --process=I`, or
with `--distributed=auto` under Slurm, Open MPI, Kubernetes or on a TPU pod. `--workdir` must be on
a disk that all share; the data may lie on each. Every example comes once an epoch whatever the
number of processes; process 0 alone writes metrics and scores and speaks; all save one checkpoint,
which any number of processes on any mesh goes on from. SIGTERM to one stops all at the same step
(at most twice `logging.every` steps later), saved. After a death the same commands go on from the
last whole checkpoint.
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
    """The settings by which the processes of a run find each other.

    Attributes:
      coordinator: host:port at which all processes can reach process 0.
      processes: number of processes.
      process: number of this process, from 0.
      method: '' where the three above are given; 'auto' asks the system that runs this process
        (Slurm, Open MPI, Kubernetes, the TPU's metadata); or jax's name for one of these.
      start_timeout: seconds within which all processes must have connected.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.

    Raises:
      ValueError: if a setting is missing or not possible; the message names its flag.
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

    Where not all have connected within `start_timeout` seconds, the process ends with an error that
    says what to check.

    Raises:
      ValueError: if the coordinator cannot be used, or nothing says where the others are.
    """
    # Its sync point is never reached in a run that is resumed: the processes agree on stopping in
    # `training.signals` instead.
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
    """Ends this process with a message if the block takes longer than `seconds`.

    It is meant for calls that cannot be interrupted.
    """

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
    """Returns whether this is process 0, which writes what only one process may write."""
    return jax.process_index() == 0


def wait_for_all(what: str, seconds: int = _SLOWEST_WORK) -> None:
    """Waits until every process has come to this barrier, which `what` names.

    Raises:
      RuntimeError: if some have not come after `seconds`, or one has died.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    get_barrier_sync_fn()(key=what, timeout_ms=seconds * 1000)


@contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Runs the block on process 0, then on the others, which find what it left in a cache.

    Where process 0 fails, the others run the block all the same, and fail likewise.
    """
    if not is_first():
        wait_for_all(what)
    try:
        yield
    finally:
        if is_first():
            wait_for_all(what)


def first_decides(value: bool) -> bool:
    """Returns the value of process 0 on all processes.

    It is meant for what they would otherwise read from a disk at different times.
    """
    if jax.process_count() == 1:
        return value
    wait_for_all("decision")
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def connect(mesh: Mesh) -> None:
    """Opens the connections that programs on this mesh use between CPU devices.

    Otherwise they are made where a group of devices first communicates, and a device that waits
    longer than 30 seconds for the others fails: no process may still be compiling then. Devices
    other than CPUs need no such care.
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
    """Runs `work` and returns its exit code once every process has finished.

    Where this process fails, the others cannot go on: it prints the error and, unless all end
    within 10 seconds, ends without waiting further, so that the others notice.
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


def own_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Returns the rows of a global batch that this process reads, in ascending order.

    `to_global` takes these rows. Processes whose devices hold the same rows (where a tensor axis
    spans them, for example) all read them; otherwise one process reads each row.

    Raises:
      ValueError: if the batch cannot be split, as in `rows_by_process`.
    """
    axes = BATCH[0]
    cut = [mesh.axis_names.index(axis) for axis in axes]
    devices = np.moveaxis(mesh.devices, cut, range(len(cut)))
    shards = devices.reshape(int(np.prod([mesh.shape[axis] for axis in axes])), -1)
    owners = np.array([[device.process_index for device in shard] for shard in shards])
    return rows_by_process(owners, batch_size)[jax.process_index()]


def rows_by_process(
    owners: Int[np.ndarray, "shards replicas"], batch_size: int
) -> dict[int, Int[np.ndarray, " rows"]]:
    """Returns the rows that each process holds.

    Args:
      owners: process of each device, [shards, replicas]; the batch is cut into equal shards in this
        order, and each shard is held by all devices of its row.
      batch_size: rows of the global batch.

    Raises:
      ValueError: if the number of shards does not divide the batch, or processes share some of
        their rows but not all: then no process could read its rows alone.
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
