"""A text that was asked of the engine: its pieces as they come, or the whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator


class QueueFull(Exception):
    """More is waiting than the engine takes: ask again later."""


class Cancelled(Exception):
    """The text was cancelled before it ended."""


class Writing:
    """What `Engine.submit` returns. Iterating and `result` wait; one of them, by one thread."""

    def __init__(self) -> None:
        self._pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """The pieces; raises what `result` raises, but for the time."""
        while (piece := self._next(None)) is not None:
            yield piece

    def result(self, timeout: float | None = None) -> str:
        """The whole text.

        Args:
          timeout: seconds to wait for each piece.

        Raises:
          TimeoutError: nothing came for so long; the text is cancelled.
          Cancelled: it was cancelled.
          RuntimeError: the engine failed.
        """
        pieces = []
        while (piece := self._next(timeout)) is not None:
            pieces.append(piece)
        return "".join(pieces)

    def cancel(self) -> None:
        """Gives its slot to others; who waits for it gets `Cancelled`."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled.is_set()

    def say(self, piece: str) -> None:
        """For the engine: a piece came."""
        if piece:
            self._pieces.put(piece)

    def end(self, error: BaseException | None = None) -> None:
        """For the engine: no more comes."""
        self._pieces.put(error)

    def _next(self, timeout: float | None) -> str | None:
        try:
            piece = self._pieces.get(timeout=timeout)
        except queue.Empty:
            self.cancel()
            raise TimeoutError(f"no token came within {timeout} s") from None
        if isinstance(piece, BaseException):
            raise piece
        return piece
