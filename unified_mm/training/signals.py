"""Clean stops: SIGTERM and Ctrl-C end a run after the current step, with its state saved.

Several processes must stop after the same step, or those that go on wait for ever. So they vote:
the signal of each goes into a reduction over all devices that is queued behind a step's work; its
result is read an interval later, when it is long done, so no step waits for it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int


@dataclass
class StopRequest:
    """A request to stop the run.

    Attributes:
      signal: number of the signal that asked for it, or None.
      unsaved: whether there is something to save before the process may end.
    """

    signal: int | None = None
    unsaved: Callable[[], bool] = lambda: False

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.signal or 0)

    def note(self, number: int) -> None:
        """Notes a signal that this process got."""
        self.signal = number

    def after(self, step: int) -> bool:
        """Returns whether the run is to stop after this step; asked once after each."""
        return self.signal is not None

    def at_last(self) -> bool:
        """Returns whether the run was to stop, asked when all steps are done."""
        return self.signal is not None


class SharedStopRequest(StopRequest):
    """A request that the processes of a run agree on: a signal to any of them counts for all.

    A vote is taken after every `every`th step and counted after the next such one, so that all
    stop up to `2 * every` steps after the signal.
    """

    def __init__(self, mesh: Mesh, every: int) -> None:
        super().__init__(unsaved=lambda: True)  # until all have agreed
        self._every = every
        self._noted = 0
        self._vote: Int[Array, ""] | None = None
        self._places = NamedSharding(mesh, P(mesh.axis_names))
        everywhere = NamedSharding(mesh, P())
        self._largest = jax.jit(partial(jnp.max, axis=0), out_shardings=everywhere)

    def note(self, number: int) -> None:
        self._noted = number

    def after(self, step: int) -> bool:
        if step % self._every:
            return False
        vote, self._vote = self._vote, self._cast()
        return vote is not None and self._count(vote)

    def at_last(self) -> bool:
        return self._count(self._cast())

    def _cast(self) -> Int[Array, ""]:
        ours = np.full(len(self._places.addressable_devices), self._noted, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._places, ours))

    def _count(self, vote: Int[Array, ""]) -> bool:
        self.signal = int(vote) or None
        return self.signal is not None


def stop_request(mesh: Mesh, every: int) -> StopRequest:
    """Returns a stop request; a `SharedStopRequest` where there are several processes."""
    if jax.process_count() == 1:
        return StopRequest()
    return SharedStopRequest(mesh, every)


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Notes the first SIGTERM or SIGINT within it; a second one ends the process at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    note = _Note(request, before)
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        note.put_back()


@dataclass
class _Note:
    """A handler that notes the first signal, and leaves further ones to the handlers before it."""

    request: StopRequest
    before: Mapping[signal.Signals, Any]
    noted: bool = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            self.put_back()
            signal.raise_signal(number)
            return
        self.noted = True
        self.request.note(number)

    def holds(self) -> bool:
        """Returns whether the process is still to save something (see `cli.interrupts`)."""
        return self.request.unsaved()

    def put_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
