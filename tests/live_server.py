"""A server of a tiny model on loopback, within the test's process."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tiny
from PIL import Image

from unified_mm.config import Config
from unified_mm.inference.engine import Counts
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.inference.writing import Cancelled, QueueFull
from unified_mm.search.nearest import Nearest
from unified_mm.search.search_index import Rows, SearchIndex
from unified_mm.serving.app import make_app
from unified_mm.serving.gate import Traffic
from unified_mm.serving.limits import Limits
from unified_mm.serving.server import DrainingServer, bind, url_of
from unified_mm.serving.service import Service
from unified_mm.serving.worker import Worker


def model(**changes: Any) -> LoadedModel:
    """A random model of the tiny task."""
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes).to_dict())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), config, 7)


def png(size: tuple[int, int] = (24, 20), seed: int = 0, format: str = "PNG") -> bytes:
    """A random picture's file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


class ByHand:
    """An engine that writes when the test says so.

    room: texts that it takes at a time.
    says: pieces of every text; without them the test writes.
    """

    def __init__(self, room: int = 8, says: tuple[str, ...] = ()) -> None:
        self.room = room
        self.says = says
        self.asked: queue.Queue[HandWriting] = queue.Queue()
        self.under_way: list[HandWriting] = []

    def submit(self, view: np.ndarray, prompt: str, decoding: Any) -> HandWriting:
        if len(self.under_way) >= self.room:
            raise QueueFull("no room")
        if "refuse" in prompt:
            raise ValueError("the prompt is refused")
        writing = HandWriting(prompt)
        if self.says:
            writing.write(*self.says, None)
        self.under_way.append(writing)
        self.asked.put(writing)
        return writing

    def counts(self) -> Counts:
        return Counts(0, len(self.under_way), 0, 0, 0)


class HandWriting:
    """A text of `ByHand`: what is put into `pieces` is written, None ends it."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.pieces: queue.Queue[Any] = queue.Queue()
        self.cancelled = threading.Event()

    def write(self, *pieces: Any) -> None:
        for piece in pieces:
            self.pieces.put(piece)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.pieces.get(timeout=30)) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        self.cancelled.set()
        self.pieces.put(Cancelled("cancelled"))


class Running(contextlib.ExitStack):
    """A server in a thread; `client` asks it, `traffic` and `server` are its own."""

    def __init__(
        self,
        loaded: LoadedModel,
        engine: Any = None,
        *,
        index: Any = None,
        attend: Any = None,
        token: str | None = None,
        limits: Limits | None = None,
        drain_seconds: float = 5.0,
    ) -> None:
        super().__init__()
        worker = self.enter_context(Worker())
        self.service = Service(loaded, worker, limits or Limits(), engine, index, attend)
        self.callback(self.service.close)
        self.traffic = Traffic()
        app = make_app(self.service, traffic=self.traffic, token=token)
        self.server = DrainingServer(app, self.traffic, drain_seconds)
        bound = self.enter_context(contextlib.closing(bind("127.0.0.1", 0)))
        bound.listen()
        self.url = url_of(bound)
        self.thread = threading.Thread(target=self.server.run, args=([bound],))
        self.thread.start()
        self.callback(self._stop)
        self.client = self.enter_context(httpx.Client(base_url=self.url, timeout=30))

    def _stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for what is about to be true."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(0.01)


def indexed(loaded: LoadedModel, files: dict[str, bytes], folder: Path) -> SearchIndex:
    """A search index of pictures, which are written into a folder; it holds no texts."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sizes = [len(content) for content in files.values()]
    vectors = loaded.embed_images([folder / name for name in files])
    rows = Rows(list(files), sizes, [], [])
    return SearchIndex(folder, {}, rows, folder, {"image": Nearest(vectors)})
