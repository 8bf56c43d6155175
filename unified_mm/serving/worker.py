"""One thread that asks the model for embeddings and maps; jobs that wait share a call."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

# Many items -> their results, in order.
Work = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass
class _Job:
    work: Work
    items: Sequence[Any]
    result: Future = field(default_factory=Future)


class Worker:
    """A thread that runs jobs in the order they came; waiting jobs of the same work share a call.

    It is a context manager: leaving it ends the thread when all that waits is done.

    Args:
      waiting: jobs in the queue at most.
      together: items of one call at most, unless one job alone has more.
    """

    def __init__(self, waiting: int = 64, together: int = 32) -> None:
        self._limit = waiting
        self._together = together
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "embeddings")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    @property
    def waiting(self) -> int:
        """The number of jobs in the queue."""
        return len(self._jobs)

    def submit(self, work: Work, items: Sequence[Any]) -> Future:
        """Queues a job and returns the future results of `work(items)`.

        Raises:
          queue.Full: too many jobs wait.
        """
        job = _Job(work, items)
        with self._lock:
            if len(self._jobs) >= self._limit:
                raise queue.Full
            self._jobs.append(job)
        self._thread.submit(self._run)
        return job.result

    def _run(self) -> None:
        """Runs the first job and those right behind it that share its call, if any are left."""
        taken: list[_Job] = []
        count = 0
        with self._lock:
            while self._jobs:
                job = self._jobs[0]
                count += len(job.items)
                if taken and (job.work != taken[0].work or count > self._together):
                    break
                taken.append(self._jobs.popleft())
        _run_together([each for each in taken if each.result.set_running_or_notify_cancel()])


def _run_together(jobs: list[_Job]) -> None:
    """Runs all jobs in one call; where it fails, each alone, so that a bad one harms no other."""
    if not jobs:
        return
    try:
        results = jobs[0].work([item for job in jobs for item in job.items])
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].result.set_exception(error)
            return
        for job in jobs:
            _run_together([job])
        return
    start = 0
    for job in jobs:
        job.result.set_result(results[start : start + len(job.items)])
        start += len(job.items)
