"""A text that was asked of the engine: its pieces as they come, or the whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator


class QueueFull(Exception):
    """The error that too many requests wait for the engine: ask again later."""


class Cancelled(Exception):
    """The error that the text was cancelled before it ended."""


class Writing:
    """The text of a request, which `Engine.submit` returns.

    One thread may take it, either by iterating or by `result`; both wait.
    """

    def __init__(self) -> None:
        self._pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces; raises what `result` raises, except TimeoutError."""
        while (piece := self._next(None)) is not None:
            yield piece

    def result(self, timeout: float | None = None) -> str:
        """Returns the whole text.

        Args:
          timeout: seconds to wait for each piece.

        Raises:
          TimeoutError: no piece came for so long; the text is cancelled.
          Cancelled: the text was cancelled.
          RuntimeError: the engine failed.
        """
        pieces = []
        while (piece := self._next(timeout)) is not None:
            pieces.append(piece)
        return "".join(pieces)

    def cancel(self) -> None:
        """Cancels the text, which frees its slot; who waits for it gets `Cancelled`."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the text was cancelled."""
        return self._cancelled.is_set()

    def say(self, piece: str) -> None:
        """Adds a piece; called by the engine."""
        if piece:
            self._pieces.put(piece)

    def end(self, error: BaseException | None = None) -> None:
        """Ends the text, with an error if any; called by the engine."""
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
