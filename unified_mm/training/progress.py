"""Progress of a run for a person: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import jax


class Starved:
    """The seconds in which devices had nothing to do, because no batch was there.

    Steps run on after they were dispatched, so that this process waits for a batch is not enough: a
    thread notes when the last step was done.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._done: Future[float] | None = None
        self._notes = ThreadPoolExecutor(1, "starved")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block, from when the last step was done."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        if self._done is None:
            self._seconds += ended - began  # nothing runs before the first batch
        elif self._done.done():
            self._seconds += max(ended - max(began, self._done.result()), 0.0)

    def until(self, results: Any) -> Future[float]:
        """Notes when the results of a step are there, without waiting for them; returns when."""
        self._done = self._notes.submit(_done_at, results)
        return self._done

    def take(self) -> float:
        """Returns the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _done_at(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()


class Progress:
    """A display of speed, time left and losses, updated each time metrics arrive."""

    def __init__(self, start: int, steps: int) -> None:
        self._steps = steps
        self._step = start
        self._time = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for the block, whose time is not that of steps."""
        began = time.perf_counter()
        yield
        self._time += time.perf_counter() - began

    def update(
        self, step: int, metrics: Mapping[str, float], batch_size: int, starved: float, done: float
    ) -> dict[str, float]:
        """Shows the metrics up to `step`.

        Args:
          step: the last step of the metrics.
          metrics: means since the last call.
          batch_size: examples of a step.
          starved: seconds since the last call in which the devices waited for data.
          done: when the last step was done, which may be a while ago.

        Returns:
          The speed since the last call, for the record: `time/steps_per_second`;
          `time/examples_per_second`, and the same as `time/images_per_second`, over all processes;
          and `time/waiting_for_data`, a share of the time.
        """
        seconds = max(done - self._time, 1e-9)
        rate = (step - self._step) / seconds
        losses = "  ".join(
            f"{name.removesuffix('/loss')} {value:.3f}"
            for name, value in metrics.items()
            if name == "loss" or name.endswith("/loss")
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate * batch_size:.0f} images/s  {losses}")
            self._bar.update(step - self._step)
        else:
            left = int((self._steps - step) / max(rate, 1e-9))
            print(
                f"step {step}/{self._steps}  {losses}  {rate:.2f} steps/s  "
                f"{rate * batch_size:.0f} images/s  ETA {left // 60}:{left % 60:02d}",
                flush=True,
            )
        self._step, self._time = step, done
        return {
            "time/steps_per_second": rate,
            "time/examples_per_second": rate * batch_size,
            "time/images_per_second": rate * batch_size,
            "time/waiting_for_data": min(starved / seconds, 1.0),
        }
