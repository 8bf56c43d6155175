"""Starting and stopping a service with its threads, and warming it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np

from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.engine import Engine
from unified_mm.inference.loaded import BATCHES, LoadedModel
from unified_mm.inference.slots import ENTERING
from unified_mm.search.search_index import SearchIndex
from unified_mm.serving.limits import Limits
from unified_mm.serving.service import Service, missing
from unified_mm.serving.worker import Worker


@contextmanager
def running_service(
    model: LoadedModel,
    limits: Limits,
    *,
    index: SearchIndex | None = None,
    attend: Callable[..., Any] | None = None,
    slots: int = 8,
    queue: int = 64,
) -> Iterator[Service]:
    """Yields a service whose threads run within the context.

    Args:
      attend: as for `Service`.
      slots: texts that are written at a time.
      queue: texts that wait at most.
    """
    with ExitStack() as stack:
        engine = None
        if "/caption" not in missing(model, index):
            engine = stack.enter_context(Engine(model, slots=slots, queue=queue))
        worker = stack.enter_context(Worker(limits.waiting))
        yield stack.enter_context(closing(Service(model, worker, limits, engine, index, attend)))


def warm_up(service: Service) -> float:
    """Compiles what requests need, so that the first need not wait; returns the seconds taken."""
    began = time.perf_counter()
    # A compiler leaves cores idle: what embeds is compiled beside what writes.
    with ThreadPoolExecutor(1) as pool:
        embedding = pool.submit(warm_up_embeddings, service)
        warm_up_texts(service)
        embedding.result()
    return time.perf_counter() - began


def warm_up_embeddings(service: Service) -> None:
    """Compiles what embeds."""
    model = service.model
    if "/embed" in service.missing:
        return
    for size in BATCHES:
        for contrast in model.predictor.task.contrasts():
            for of in contrast.between:
                asked = model.task.example_batch(size, training=False)
                model.predictor.embed(asked, of, contrast.name)


def warm_up_texts(service: Service) -> None:
    """Compiles what writes, and what shows the attention of a text."""
    model = service.model
    if "/caption" in service.missing:
        return
    for prompt in prompts_of_each_width(model):
        for together in ENTERING:
            # One more than enter at once: the first of them enters before the others come.
            views = [_noise(model) for _ in range(together + 1)]
            writing = [service.begin(view, prompt, GREEDY) for view in views]
            texts = ["".join(each) for each in writing]
    if service.attend is not None and "/attention" not in service.missing:
        service.attend(model, views[0], "", texts[0] or "a")


def prompts_of_each_width(model: LoadedModel) -> list[str]:
    """Returns one prompt for each compiled program that reads prompts.

    Prompts are filled up to few widths (`predictor.width_of`).
    """
    found: dict[int, str] = {}
    for words in range(model.task.modalities["text"].length):
        prompt = " ".join(["a"] * words)
        try:
            arrays, _ = model.predictor.prompts([prompt])
        except ValueError:  # there is no room for more, or no begin token
            continue
        found.setdefault(arrays["ids"].shape[1], prompt)
    return list(found.values())


def _noise(model: LoadedModel) -> np.ndarray:
    """Returns a picture of random pixels, which the engine has not seen before."""
    size = model.task.modalities["image"].size
    return np.random.default_rng().integers(0, 256, (size, size, 3), np.uint8)
