"""One thread that asks the model for embeddings and maps; what waits together goes together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
    """Runs jobs in the order they came in; jobs of the same work that wait are run in one call.

    A context manager: leaving it ends the thread, and what still waits is cancelled.

    waiting: jobs in the queue at most.
    together: items of one call at most, unless one job alone has more.
    """

    def __init__(self, waiting: int = 64, together: int = 32) -> None:
        self._together = together
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting + 1)  # one to end the thread
        self._waiting = waiting
        self._thread = threading.Thread(target=self._run, name="embeddings", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._jobs.qsize()

    def submit(self, work: Work, items: Sequence[Any]) -> Future:
        """The future results of `work(items)`. Raises queue.Full."""
        if self._jobs.qsize() >= self._waiting:
            raise queue.Full
        job = _Job(work, items)
        self._jobs.put_nowait(job)
        return job.result

    def _run(self) -> None:
        following: _Job | None = None
        while True:
            job = following or self._jobs.get()
            if job is None:
                return self._cancel_rest()
            jobs, following, ended = self._beside(job)
            _run_together([each for each in jobs if each.result.set_running_or_notify_cancel()])
            if ended:
                return self._cancel_rest()

    def _beside(self, first: _Job) -> tuple[list[_Job], _Job | None, bool]:
        """The job and its followers of the same work, the next one, and whether all ends."""
        jobs, count = [first], len(first.items)
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, None, False
            if job is None:
                return jobs, None, True
            count += len(job.items)
            if job.work != first.work or count > self._together:
                return jobs, job, False
            jobs.append(job)

    def _cancel_rest(self) -> None:
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job.result.cancel()


def _run_together(jobs: list[_Job]) -> None:
    """One call for all; where that fails, each alone, so that a bad one harms no other."""
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
