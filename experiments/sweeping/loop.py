"""The loop of a sweep: starts missing runs, watches running ones, stops cleanly."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from experiments.sweeping.jobs import End, Job, Launcher
from experiments.sweeping.progress import progress_of
from experiments.sweeping.runs import Run, finished
from experiments.sweeping.table import Row, Table
from unified_mm.cli.messages import say


class SweepStopped(Exception):
    """Error for a signal that asked the sweep to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def first_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each run: finished, waiting, or another run in its folder."""
    rows = [Row(run) for run in runs]
    for row in rows:
        with differing(row):
            row.state = "finished" if finished(row.run) else "waiting"
    return rows


@contextlib.contextmanager
def differing(row: Row) -> Iterator[None]:
    """Marks a row as one that differs if the body finds something else in its run's place."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        row.state, row.said = "differs", str(error)


def carry_out(rows: list[Row], launcher: Launcher, table: Table) -> Iterator[None]:
    """Executes the waiting runs, until every row is finished, failed or differs.

    Args:
      rows: the rows of `first_rows`; they are kept up to date.
      launcher: starts the runs.
      table: is shown after each look at the jobs.

    Yields:
      None, each time that there is nothing to do but wait.
    """
    jobs: dict[str, Job] = {}
    while any(row.state in ("waiting", "queued", "running") for row in rows):
        begin(rows, launcher, jobs)
        for row in rows:
            if job := jobs.get(row.run.name):
                look(row, job, jobs)
        table.show(rows)
        if jobs:
            yield


def begin(rows: Sequence[Row], launcher: Launcher, jobs: dict[str, Job]) -> None:
    """Takes up jobs that are already running, then starts as many as there is room for."""
    waiting = []
    for row in rows:
        if row.state != "waiting":
            continue
        with differing(row):
            if job := launcher.found(row.run):
                take(row, job, jobs)
            else:
                waiting.append(row)
    if chosen := waiting[: launcher.room(len(jobs))]:
        started = launcher.start([row.run for row in chosen])
        for row, job in zip(chosen, started, strict=True):
            take(row, job, jobs)


def take(row: Row, job: Job, jobs: dict[str, Job]) -> None:
    """Gives a row the job that executes its run."""
    jobs[row.run.name] = job
    row.state = job.state()


def look(row: Row, job: Job, jobs: dict[str, Job]) -> None:
    """Updates a row with the state of its job."""
    end = job.ended()
    row.progress = progress_of(row.run.folder)
    if end is None:
        row.state = job.state()
        return
    del jobs[row.run.name]
    with differing(row):
        settle(row, end)


def settle(row: Row, end: End) -> None:
    """Updates the row of a job that has ended: finished, failed, or waiting again.

    It waits again if another process has given the run up.

    Raises:
      ValueError, RunFolderError: if its folder holds another run, or a damaged one.
    """
    if finished(row.run):
        row.state = "finished"
        row.progress = replace(row.progress, step=row.progress.steps or row.progress.step)
    elif end.again:
        row.state = "waiting"
    else:
        row.state = "failed"
        row.said = "\n".join([str(end), *(f"  | {line}" for line in end.last_lines)])


def watch(work: Iterator[None], launcher: Launcher, interval: float) -> None:
    """Does the work of a sweep to its end, and waits `interval` seconds wherever it yields.

    Raises:
      SweepStopped: if SIGTERM or Ctrl-C arrives. Whatever is raised, the launcher has left its
        jobs.
    """
    with signals_told() as wait:
        try:
            for _ in work:
                wait(interval)
        except BaseException:
            say(launcher.leave())
            raise


@contextlib.contextmanager
def signals_told() -> Iterator[Callable[[float], None]]:
    """Yields a function that sleeps some seconds, and raises `SweepStopped` after a signal.

    SIGTERM or Ctrl-C so ends a sweep only where it waits, when all that it has started is known. A
    second signal acts as it did before.
    """
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def tell(number: int, frame: FrameType | None) -> None:
        restore()
        arrived.put(number)

    def wait(seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            raise SweepStopped(arrived.get(timeout=seconds))

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, tell)
    try:
        yield wait
    finally:
        restore()
