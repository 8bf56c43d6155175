"""Stopping cleanly: SIGTERM and Ctrl-C end a run after the step at hand, with its state saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Which signal asked the run to stop, if any."""

    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.signal or 0)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it, the first SIGTERM or SIGINT is noted; a second one ends the process at once."""
    request = StopRequest()
    watched = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in watched}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for each in watched:
            signal.signal(each, before[each])

    for number in watched:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number in watched:
            signal.signal(number, before[number])
