"""Speed with many clients: one text at a time, static batches, or continuous batching."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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
    expected: list[str] = []
    for name, at_once, ask in ways(model, slots):
        warm_up(ask, requests, slots)
        began = time.perf_counter()
        seconds, texts = load(ask, requests, clients)
        took = time.perf_counter() - began
        expected = expected or texts
        rows.append(
            {
                "name": name,
                "clients": clients,
                "slots": at_once,
                "requests_per_second": round(count / took, 2),
                **percentiles(seconds),
                "tokens": sum(asked.decoding.tokens or 0 for asked in requests),
                "equal_texts": sum(a == b for a, b in zip(texts, expected, strict=True)),
            }
        )
        say(
            "{name:<16} {requests_per_second:>8.2f} requests/s  p50 {p50_ms:>9.2f} ms  "
            "p95 {p95_ms:>9.2f} ms".format(**rows[-1])
        )
    return rows


def ways(model: LoadedModel, slots: int) -> Iterator[tuple[str, int, Ask]]:
    """Yields the ways to serve: the name, the texts written at once, and what a client calls."""
    yield "one at a time", 1, static_batches(model, 1)
    yield "static batches", slots, static_batches(model, slots)
    with closing(Engine(model, slots=slots)) as engine:
        yield (
            "continuous",
            slots,
            lambda asked: engine.submit(asked.view, "", asked.decoding).result(),
        )


def warm_up(ask: Ask, requests: Sequence[Asked], slots: int) -> None:
    """Compiles everything: sends one request, `slots` at once, and twice as many at once."""
    for together in (1, slots, 2 * slots):
        load(ask, requests[:together], together)


def load(ask: Ask, requests: Sequence[Asked], clients: int) -> tuple[list[float], list[str]]:
    """Returns the seconds and the text of each request, sent by `clients` threads."""

    def timed(asked: Asked) -> tuple[float, str]:
        began = time.perf_counter()
        text = ask(asked)
        return time.perf_counter() - began, text

    with ThreadPoolExecutor(clients) as pool:
        seconds, texts = zip(*pool.map(timed, requests))
    return list(seconds), list(texts)


def static_batches(model: LoadedModel, size: int) -> Ask:
    """Returns a server that writes up to `size` waiting texts as one batch and then answers all.

    The client that has the lock writes for those that wait, until it has its own answer.
    """
    writing = threading.Lock()
    waiting: deque[tuple[Asked, Future[str]]] = deque()

    def ask(asked: Asked) -> str:
        answer: Future[str] = Future()
        waiting.append((asked, answer))
        with writing:
            while not answer.done():
                answer_batch(model, [waiting.popleft() for _ in range(min(size, len(waiting)))])
        return answer.result()

    return ask


def answer_batch(model: LoadedModel, batch: Sequence[tuple[Asked, Future[str]]]) -> None:
    """Writes the texts of a batch, all as long as the longest, and answers each with its own."""
    most = max(asked.decoding.tokens or 0 for asked, _ in batch)
    together = replace(batch[0][0].decoding, tokens=most)
    try:
        views = [asked.view for asked, _ in batch]
        written = model.generate(views, [""] * len(views), together)
    except BaseException as error:  # raised where it is waited for
        for _, answer in batch:
            answer.set_exception(error)
        return
    for (asked, answer), (text,) in zip(batch, written, strict=True):
        answer.set_result(model.task.tokenizer.decode(text.tokens[: asked.decoding.tokens]))
