"""Continuous batching: requests of different lengths enter and leave a fixed number of slots.

Yu et al. 2022, "Orca", section 3.1: after every token, texts that have ended make room for others.
Requests about the same image share its cached keys and values. `submit` returns the pieces as they
come; what is drawn for a request does not depend on the others.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from unified_mm.inference.decoding import GREEDY, Decoding
from unified_mm.inference.loaded import LoadedModel, listed_texts
from unified_mm.inference.slots import ENTERING, Entry, Slots
from unified_mm.inference.streaming import Spelling
from unified_mm.inference.writing import Cancelled, QueueFull, Writing


@dataclass(frozen=True)
class Request:
    """A request: an image, a prompt, how to decode, and the `Writing` that takes the text."""

    view: UInt8[np.ndarray, "size size 3"]
    prompt: str
    decoding: Decoding
    writing: Writing


@dataclass(frozen=True)
class Counts:
    """Counts of what an engine has done and is doing.

    Attributes:
      waiting: requests that wait for a slot.
      running: requests whose texts are being written.
      tokens: tokens written in all.
      images_read: requests whose image had to be read.
      images_shared: requests whose image was cached.
    """

    waiting: int
    running: int
    tokens: int
    images_read: int
    images_shared: int


class Engine:
    """An engine that writes texts about images for many callers at once; a context manager.

    Args:
      model: a model that was trained to write.
      slots: texts that are written at the same time.
      images: images that stay cached; the one asked for longest ago is dropped first.
      queue: requests that may wait for a slot.

    Raises:
      ValueError: a model that does not write or has exits to take, or sizes that are too small.
    """

    def __init__(
        self, model: LoadedModel, *, slots: int = 8, images: int = 64, queue: int = 256
    ) -> None:
        for name, value, least in (
            ("slots", slots, 1),
            ("images", images, ENTERING[-1]),
            ("queue", queue, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if model.predictor.exits:
            raise ValueError("the engine runs all layers: load the run without exits")
        self._model = model
        self._slots = Slots(model.predictor, slots, images)
        self._known = KnownImages(images)
        self._limit = queue
        self._waiting: deque[Request] = deque()
        self._running: dict[int, tuple[Request, Spelling]] = {}
        self._free = list(range(slots))
        self._tokens = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, view: Any, prompt: str = "", decoding: Decoding = GREEDY) -> Writing:
        """Submits a request for a text about an image, after a prompt ('' for a caption).

        Args:
          view: uint8 [size, size, 3], as `LoadedModel.view` makes it.
          prompt: the beginning of the text.
          decoding: how the text is decoded; one text, without beams.

        Returns:
          The text, piece by piece or whole.

        Raises:
          ValueError: a view of another shape or type, or a text that cannot be written.
          QueueFull: too many requests are waiting.
          RuntimeError: the engine was closed, or failed.
        """
        view = np.asarray(view)
        size = self._model.task.modalities["image"].size
        if view.shape != (size, size, 3) or view.dtype != np.uint8:
            raise ValueError(
                f"a view is uint8 [{size}, {size}, 3], not {view.dtype} {list(view.shape)}: "
                "LoadedModel.view makes one"
            )
        listed_texts([prompt], "prompts")
        self._slots.check(prompt, decoding)
        request = Request(view, prompt, decoding, Writing())
        with self._changed:
            if self._failure is not None:
                raise RuntimeError("the engine failed") from self._failure
            if self._closing:
                raise RuntimeError("the engine was closed")
            if len(self._waiting) >= self._limit:
                raise QueueFull(f"{len(self._waiting)} requests are waiting: ask again later")
            self._waiting.append(request)
            self._changed.notify()
        return request.writing

    def counts(self) -> Counts:
        """Returns the counts of what it has done so far."""
        return Counts(
            len(self._waiting),
            len(self._running),
            self._tokens,
            self._known.read,
            self._known.shared,
        )

    def close(self, timeout: float | None = None) -> bool:
        """Stops taking requests and waits until those that it took are answered.

        Args:
          timeout: seconds after which unanswered requests are cancelled; None waits for all.

        Returns:
          Whether all were answered.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        done = not self._thread.is_alive()
        if not done:
            with self._changed:
                for request in self._pending():
                    request.writing.cancel()
            self._thread.join()
        return done

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """Runs the engine until it is closed and idle; the target of its thread."""
        try:
            while self._wait():
                self._enter()
                if self._running:
                    self._step()
        except BaseException as error:  # whoever waits must be told, whatever it was
            self._fail(error)

    def _wait(self) -> bool:
        """Waits for something to do; returns False when there is nothing and never will be."""
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._changed.wait()
            return bool(self._waiting or self._running)

    def _enter(self) -> None:
        """Gives free slots to the requests that have waited longest."""
        while self._free and (requests := self._next(min(len(self._free), ENTERING[-1]))):
            slots = [self._free.pop() for _ in requests]
            tokenizer = self._model.task.tokenizer
            for slot, request in zip(slots, requests, strict=True):
                spelling = Spelling(tokenizer, request.decoding.stop_ids(tokenizer))
                self._running[slot] = request, spelling
            fresh, rows = self._known.rows([request.view for request in requests])
            if fresh:
                self._slots.read([requests[i].view for i in fresh], [rows[i] for i in fresh])
            entries = [
                Entry(slot, row, request.prompt, request.decoding)
                for slot, row, request in zip(slots, rows, requests, strict=True)
            ]
            for slot, token, last in zip(slots, *self._slots.enter(entries), strict=True):
                self._say(slot, int(token), bool(last))

    def _next(self, count: int) -> list[Request]:
        """Takes up to `count` requests from the queue and ends those that were cancelled."""
        with self._changed:
            taken: list[Request] = []
            while self._waiting and len(taken) < count:
                request = self._waiting.popleft()
                if request.writing.cancelled:
                    request.writing.end(Cancelled())
                else:
                    taken.append(request)
            return taken

    def _step(self) -> None:
        tokens, done = self._slots.step()
        for slot in list(self._running):
            self._say(slot, int(tokens[slot]), bool(done[slot]))

    def _say(self, slot: int, token: int, last: bool) -> None:
        """Hands a token to its request; frees the slot after the last one or a cancellation."""
        request, spelling = self._running[slot]
        if request.writing.cancelled:
            self._leave(slot, Cancelled())
            return
        self._tokens += 1
        request.writing.say(spelling.add(token, last=last))
        if last:
            self._leave(slot, None)

    def _leave(self, slot: int, error: BaseException | None) -> None:
        request, _ = self._running.pop(slot)
        self._free.append(slot)
        request.writing.end(error)

    def _pending(self) -> list[Request]:
        return [*self._waiting, *(request for request, _ in self._running.values())]

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            pending = self._pending()
            self._waiting.clear()
            self._running.clear()
        for request in pending:
            failure = RuntimeError(f"the engine failed: {error}")
            failure.__cause__ = error
            request.writing.end(failure)


class KnownImages:
    """A map from an image's content to its row in the cache; the least recently used goes first.

    Attributes:
      read: how often an image was not cached.
      shared: how often an image was cached.
    """

    def __init__(self, rows: int) -> None:
        self._rows: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(rows))
        self.read = self.shared = 0

    def rows(self, views: list[UInt8[np.ndarray, "size size 3"]]) -> tuple[list[int], list[int]]:
        """Assigns a row to each image; at most as many images as there are rows.

        Returns:
          Indices of the images that must first be read into their rows (each once), and all rows.
        """
        fresh, found = [], []
        for number, view in enumerate(views):
            key = hashlib.sha256(view.tobytes()).digest()
            if key in self._rows:
                self.shared += 1
                self._rows.move_to_end(key)
            else:
                self.read += 1
                row = self._free.pop() if self._free else self._rows.popitem(last=False)[1]
                self._rows[key] = row
                fresh.append(number)
            found.append(self._rows[key])
        return fresh, found
