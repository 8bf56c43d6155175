"""Progress of a run for a person: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any


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

    def pause(self) -> None:
        """Restarts the clock, so that time without training does not count as steps."""
        self._time = time.perf_counter()

    def update(self, step: int, metrics: Mapping[str, float], batch_size: int) -> dict[str, float]:
        """Shows the metrics up to `step`.

        Returns:
          The speed since the last call, for the record: `time/steps_per_second`, and
          `time/images_per_second` over all processes.
        """
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, 1e-9)
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
        self._step, self._time = step, now
        return {
            "time/steps_per_second": rate,
            "time/images_per_second": rate * batch_size,
        }
