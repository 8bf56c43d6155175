"""The progress of a run, read from its metrics while it trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unified_mm.default_config import defaults
from unified_mm.runs.folder import RunFolder

TAIL = 65536  # bytes that hold the newest lines


@dataclass(frozen=True)
class Progress:
    """The progress of a run; None where nothing is known yet.

    Attributes:
      step: steps that are done.
      steps: steps in all.
      loss: the loss of the last logged interval.
      rate: steps a second in that interval.
    """

    step: int = 0
    steps: int | None = None
    loss: float | None = None
    rate: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until training ends, without the evaluation after it."""
        if not self.rate or self.steps is None:
            return None
        return max(0, self.steps - self.step) / self.rate


def progress_of(folder: RunFolder) -> Progress:
    """Returns the progress of a run, by its config and metrics."""
    if not folder.exists:
        return Progress()
    steps = folder.read_config(defaults())["train"]["steps"]
    found = [each for each in newest_records(folder.metrics) if "loss" in each]
    if not found:
        return Progress(steps=steps)
    last = found[-1]
    return Progress(int(last["step"]), steps, last["loss"], last.get("time/steps_per_second"))


def newest_records(path: Path) -> list[dict[str, Any]]:
    """Returns the last records of a metrics file, without damaged ones."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut off by the tail's begin
            continue
        if is_record(record):
            found.append(record)
    return found


def is_record(record: Any) -> bool:
    """Returns whether a line is what training writes: numbers by name, with the step."""
    return (
        isinstance(record, dict)
        and "step" in record
        and all(isinstance(value, int | float) for value in record.values())
    )


def duration(seconds: float | None) -> str:
    """Formats seconds as training's progress bar does, 03:20 or 1:05:00; '' if not known."""
    return "" if seconds is None else tqdm.format_interval(seconds)
