"""Metrics of a run: `metrics.jsonl` is the record, TensorBoard a copy of it to look at.

Each write is one line of JSON: {"step": 10, "train/loss": 2.5}. By convention, values that
depend on the clock have names that begin with `time/`; all others are equal, bit by bit, between
two runs of one config and seed on one kind of machine.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import Float64, Int64

from unified_mm.files import write_atomically
from unified_mm.runs.environment import or_warn

_TENSORBOARD = "TensorBoard's files"


class MetricsWriter:
    """A writer of metrics, line by line, so that a kill loses none and a resumed run repeats none.

    Args:
      path: the JSON lines file.
      tensorboard: folder for TensorBoard's files, or None for none.
      resume_step: the step the run goes on from: what is recorded of later steps is dropped, for
        the run is about to write it again. None: the run starts, all that was recorded is dropped.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensorboard: str | os.PathLike[str] | None = None,
        *,
        resume_step: int | None = None,
    ):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(path, resume_step)
        self._path = path
        self._file = open(path, "a", encoding="utf-8")
        self._copied = True  # all that was written so far
        self._events: _Events | None = None
        if tensorboard is not None:
            self._events = or_warn(_TENSORBOARD, lambda: _Events(Path(tensorboard), resume_step))

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends one line; values that are not finite become null, for JSON has no NaN."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append(step, {name: _json_number(value) for name, value in numbers.items()})
        self._copy(step, "scalar", numbers)

    def write_new(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends the line as `write` does, unless the step has all these metrics already."""
        known = read_metrics(self._path)
        if any(name not in known or step not in known[name][0] for name in values):
            self.write(step, values)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Appends a line of text, such as a banner that belongs to the numbers."""
        self._append(step, {name: text})
        self._copy(step, "text", {name: text})

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            or_warn(_TENSORBOARD, self._events.close)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, step: int, kind: str, values: Mapping[str, float | str]) -> None:
        """Writes values for TensorBoard; where that fails once, it is not tried again."""
        events = self._events
        if events is None or not self._copied:
            return
        self._copied = or_warn(_TENSORBOARD, lambda: events.add(step, kind, values)) is not None

    def _append(self, step: int, values: Mapping[str, float | str | None]) -> None:
        if "step" in values:
            raise ValueError("a metric cannot be named 'step': that is the line's own field")
        self._file.write(_line({"step": int(step), **values}))
        self._file.flush()


def read_metrics(
    path: str | os.PathLike[str],
) -> dict[str, tuple[Int64[np.ndarray, " records"], Float64[np.ndarray, " records"]]]:
    """Returns each metric's (steps, values) in the order written; null is NaN, texts are left out.

    A torn last line, as a kill leaves it, is passed over.

    Raises:
      ValueError: another line cannot be read; the message names file and line.
    """
    columns: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for record in _records(Path(path)):
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                columns[name][0].append(record["step"])
                columns[name][1].append(math.nan if value is None else value)
    return {
        name: (np.array(steps, np.int64), np.array(values, np.float64))
        for name, (steps, values) in columns.items()
    }


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends, so the last is torn
        try:
            record = _checked(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not a line of metrics ({error}); "
                "mend or remove the line to go on"
            ) from error
        yield record


def _checked(record: Any) -> dict[str, Any]:
    """Returns a line's record: a whole number as `step`, and numbers, texts and null.

    Raises:
      ValueError: it is anything else.
    """
    if not isinstance(record, dict):
        raise ValueError("it holds no object")
    if type(record.get("step")) is not int:
        raise ValueError("it has no whole number as step")
    for name, value in record.items():
        if value is not None and not isinstance(value, int | float | str):
            raise ValueError(f"{name} is no number")
    return record


def _drop_after(path: Path, step: int | None) -> None:
    if not path.exists():
        return
    kept = [r for r in _records(path) if step is not None and r["step"] <= step]
    write_atomically(path, "".join(map(_line, kept)).encode())


class _Events:
    """A file of TensorBoard's events, written at once.

    `SummaryWriter` writes in a thread: where that fails, the thread ends and who writes next waits
    for it for ever.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        # TensorBoard itself passes over the events of earlier files from this step on.
        purge_step = 0 if resume_step is None else resume_step + 1
        folder.mkdir(parents=True, exist_ok=True)
        # A file's name holds only the second it was opened in; two of one second must not collide.
        self._file = EventsWriter(str(folder / "events"), f".{purge_step}.{os.getpid()}")
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, kind: str, values: Mapping[str, float | str]) -> bool:
        """Writes values by name, of the kind 'scalar' or 'text', and returns True."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary=getattr(summary, kind)(name, value))
        return self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **content))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
