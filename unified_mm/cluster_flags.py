"""The flags by which a command is one of several processes."""

from __future__ import annotations

from absl import flags

from unified_mm.parallel.processes import Cluster

FLAGS = (
    "coordinator",
    "processes",
    "process",
    "distributed",
    "start_timeout",
    "heartbeat_timeout",
)

COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0, where the processes of one run meet."
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are in all.")
PROCESS = flags.DEFINE_integer("process", None, "Which of the processes this is, from 0.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "",
    "Instead of these three: 'auto' asks Slurm, Open MPI, Kubernetes or the TPU where the other "
    "processes are; or one of them by jax's name: slurm, ompi, mpi4py, gcetpu, gketpu.",
)
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds until all must have met.")
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead."
)


def cluster_from_flags() -> Cluster | None:
    """What the flags say; None where none was given: then this process is alone.

    Raises:
      ValueError: flags that do not go together.
    """
    if not any(flags.FLAGS[name].present for name in FLAGS):
        return None
    return Cluster(
        COORDINATOR.value,
        PROCESSES.value,
        PROCESS.value,
        DISTRIBUTED.value,
        START_TIMEOUT.value,
        HEARTBEAT_TIMEOUT.value,
    )
