"""Speed with many clients: one text at a time, static batches, or continuous batching."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unified_mm.benchmarks.timing import percentiles
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.engine import Engine
from unified_mm.inference.loaded import LoadedModel

Ask = Callable[["Asked"], str]


@dataclass(frozen=True)
class Asked:
    """A request for a caption.

    Attributes:
      view: the image as the model sees it.
      decoding: how the text is decoded, and how many tokens it has.
    """

    view: Any
    decoding: Decoding


def make_requests(
    model: LoadedModel, views: Sequence[Any], count: int, seed: int = 0
) -> list[Asked]:
    """Returns requests about randomly drawn images, with texts of different lengths.

    Lengths are uniform between a quarter of what the model may write and all of it.
    """
    rng = np.random.default_rng(seed)
    most = model.task.modalities["text"].length - 1
    images = rng.integers(len(views), size=count)
    lengths = rng.integers(most // 4, most + 1, size=count)
    return [
        Asked(views[image], Decoding(tokens=int(length)))
        for image, length in zip(images, lengths, strict=True)
    ]


def request_table(
    model: LoadedModel,
    views: Sequence[Any],
    *,
    count: int,
    clients: int,
    slots: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures requests a second and their latency, for clients that each ask again when answered.

    Args:
      model: the model that answers.
      views: images that are asked about.
      count: number of requests.
      clients: number of clients.
      slots: number of texts that are written at once.
      say: called with a line for each row.

    Returns:
      A row for each way to serve; `equal_texts` counts the texts that are the same as one at a
      time.
    """
    requests = make_requests(model, views, count)
    rows: list[dict[str, Any]] = []
    for name, opened in (
        ("one at a time", _one_at_a_time(model)),
        ("static batches", _StaticBatches(model, slots)),
        ("continuous", _Continuous(model, slots)),
    ):
        with opened as ask:
            warm_up(ask, requests, slots)
            began = time.perf_counter()
            seconds, texts = load(ask, requests, clients)
            took = time.perf_counter() - began
        rows.append(
            {
                "name": name,
                "clients": clients,
                "slots": 1 if name == "one at a time" else slots,
                "requests_per_second": round(count / took, 2),
                **percentiles(seconds),
                "tokens": sum(asked.decoding.tokens or 0 for asked in requests),
            }
        )
        say(
            "{name:<16} {requests_per_second:>8.2f} requests/s  p50 {p50_ms:>9.2f} ms  "
            "p95 {p95_ms:>9.2f} ms".format(**rows[-1])
        )
        if rows[0]["name"] == name:
            expected = texts
        rows[-1]["equal_texts"] = sum(a == b for a, b in zip(texts, expected, strict=True))
    return rows


def warm_up(ask: Ask, requests: Sequence[Asked], slots: int) -> None:
    """Compiles everything: sends one request, `slots` at once, and twice as many at once."""
    for together in (1, slots, 2 * slots):
        load(ask, requests[:together], together)


def load(ask: Ask, requests: Sequence[Asked], clients: int) -> tuple[list[float], list[str]]:
    """Returns the seconds and the text of each request, sent by `clients` threads."""
    seconds, texts = [0.0] * len(requests), [""] * len(requests)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        todo.put(number)
    failures: list[BaseException] = []

    def client() -> None:
        try:
            while True:
                number = todo.get_nowait()
                began = time.perf_counter()
                texts[number] = ask(requests[number])
                seconds[number] = time.perf_counter() - began
        except queue.Empty:
            return
        except BaseException as error:  # told below, in the thread that asked
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return seconds, texts


def _one_at_a_time(model: LoadedModel) -> AbstractContextManager[Ask]:
    lock = threading.Lock()

    def ask(asked: Asked) -> str:
        with lock:
            return model.caption([asked.view], asked.decoding)[0]

    return nullcontext(ask)


class _StaticBatches:
    """A server that writes up to `size` waiting texts as one batch and then answers them all."""

    def __init__(self, model: LoadedModel, size: int) -> None:
        self._model = model
        self._size = size
        self._waiting: queue.Queue[tuple[Asked, queue.SimpleQueue] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Ask:
        self._thread.start()

        def ask(asked: Asked) -> str:
            answer: queue.SimpleQueue = queue.SimpleQueue()
            self._waiting.put((asked, answer))
            found = answer.get()
            if isinstance(found, BaseException):
                raise found
            return str(found)

        return ask

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._size and not self._waiting.empty():
                more = self._waiting.get()
                if more is None:
                    self._waiting.put(None)
                    break
                batch.append(more)
            try:
                self._answer(batch)
            except BaseException as error:  # raised where it is waited for
                for _, answer in batch:
                    answer.put(error)

    def _answer(self, batch: list[tuple[Asked, queue.SimpleQueue]]) -> None:
        most = max(asked.decoding.tokens or 0 for asked, _ in batch)
        together = replace(batch[0][0].decoding, tokens=most)
        views = [asked.view for asked, _ in batch]
        tokenizer = self._model.task.tokenizer
        for (asked, answer), (text,) in zip(
            batch, self._model.generate(views, [""] * len(views), together), strict=True
        ):
            answer.put(tokenizer.decode(text.tokens[: asked.decoding.tokens]))


class _Continuous:
    def __init__(self, model: LoadedModel, slots: int) -> None:
        self._model = model
        self._slots = slots

    def __enter__(self) -> Ask:
        self._engine = Engine(self._model, slots=self._slots)

        def ask(asked: Asked) -> str:
            return self._engine.submit(asked.view, "", asked.decoding).result()

        return ask

    def __exit__(self, *_: object) -> None:
        self._engine.close()
