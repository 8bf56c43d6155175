"""The service behind the routes, which asks the model without blocking the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from unified_mm.data.images import ImageError
from unified_mm.inference.classes import class_embeddings, filled, templates_of
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.engine import Counts
from unified_mm.inference.loaded import LoadedModel, Windows
from unified_mm.inference.writing import QueueFull
from unified_mm.objectives.captioning import Captioning
from unified_mm.search.items import noun
from unified_mm.search.search_index import Hit, SearchIndex, mixed
from unified_mm.serving.limits import Limits, Refusal, busy
from unified_mm.serving.metrics import Metrics
from unified_mm.serving.pictures import shown, view_of
from unified_mm.serving.worker import Worker

log = logging.getLogger(__name__)
View = UInt8[np.ndarray, "size size 3"]


@runtime_checkable
class Writer(Protocol):
    """An engine that writes texts: `unified_mm.inference.engine.Engine`."""

    def submit(self, view: np.ndarray, prompt: str, decoding: Decoding) -> Any: ...

    def counts(self) -> Counts: ...


@dataclass(eq=False)
class Service:
    """A model with its index, used by many requests at a time.

    Attributes:
      model: the run's.
      worker: the thread for embeddings and attention maps.
      limits: of each request.
      engine: what writes texts; None where the model cannot.
      index: the `SearchIndex`, or None.
      attend: (model, view, prompt, text) -> words and their maps, [words, rows, cols]; or None.
      missing: by route, why it cannot be served here.
      failed: whether the engine is broken for good.
    """

    model: LoadedModel
    worker: Worker
    limits: Limits
    engine: Writer | None = None
    index: SearchIndex | None = None
    attend: Callable[..., Any] | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        self.missing = missing(self.model, self.index)
        # One thread for each text that is being written or waits for it.
        self._readers = ThreadPoolExecutor(self.limits.requests, "pieces")
        self._decoders = ThreadPoolExecutor(2, "pictures")
        # One function for each modality and space, so that jobs of the same share a call.
        rows = self.model.embed_rows
        self._embedder = cache(lambda of, space: partial(rows, of=of, objective=space))

    def close(self) -> None:
        """Ends the threads once their work is done."""
        self._readers.shutdown()
        self._decoders.shutdown()

    async def view(self, data: bytes, place: str) -> View:
        """Returns an uploaded picture as the model sees it.

        Raises:
          Refusal: as `view_of` does.
        """
        return await self._decode(view_of, self.model, data, self.limits, place)

    def begin(self, view: View, prompt: str, decoding: Decoding) -> Any:
        """Queues a text to be written, and returns what `Engine.submit` does.

        Raises:
          Refusal: 429 a full queue, 422 a wrong prompt, 503 a broken engine.
        """
        assert self.engine is not None
        try:
            return self.engine.submit(view, prompt, decoding)
        except QueueFull as error:
            raise busy("too many texts wait to be written") from error
        except ValueError as error:
            raise Refusal(422, "wrong_prompt", str(error)) from error
        except RuntimeError as error:
            self.failed = True
            log.exception("no text can be written any more")
            message = "the engine that writes has failed: the server must be started again"
            raise Refusal(503, "engine_failed", message) from error

    def watch(self, metrics: Metrics) -> None:
        """Adds gauges of the jobs and texts that wait for the model to the metrics."""
        metrics.watch("unified_mm_embeddings_waiting", "Jobs.", lambda: self.worker.waiting)
        if (engine := self.engine) is not None:
            for name in ("waiting", "running", "tokens", "images_read", "images_shared"):
                value = partial(lambda each: float(getattr(engine.counts(), each)), name)
                metrics.watch(f"unified_mm_texts_{name}", "As `Engine.counts` has it.", value)

    async def pieces(self, writing: Any) -> AsyncGenerator[str, None]:
        """Yields the pieces of a text as they are written; a text that is left early is cancelled.

        Raises:
          Refusal: 504 not written in time.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

        def read() -> None:
            last: BaseException | None = None
            try:
                for piece in writing:
                    loop.call_soon_threadsafe(arrived.put_nowait, piece)
            except BaseException as error:
                last = error
            loop.call_soon_threadsafe(arrived.put_nowait, last)

        ends = time.monotonic() + self.limits.seconds
        reading = loop.run_in_executor(self._readers, read)
        try:
            while True:
                try:
                    async with asyncio.timeout(ends - time.monotonic()):
                        piece = await arrived.get()
                except TimeoutError as error:
                    seconds = self.limits.seconds
                    message = f"not written within {seconds:g} s; ask for less, or later"
                    raise Refusal(504, "timeout", message) from error
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            if not reading.done():
                writing.cancel()

    def space(self, of: str, objective: str = "") -> str:
        """Returns the name of the space that items of a modality are embedded into.

        Raises:
          Refusal: 422 none, or several and none is named; it says what there is.
        """
        predictor = self.model.predictor
        try:
            if of == "image" and not objective and not predictor.task.contrasts(of):
                of = "text"  # the run may embed texts alone
            return predictor.task.space_of(of, objective).name
        except ValueError as error:
            code = "no_pictures" if of == "image" else "no_space"
            raise Refusal(422, code, str(error)) from error

    async def embed(
        self, of: str, items: Mapping[str, str | bytes], space: str
    ) -> Float[np.ndarray, "B Z"]:
        """Returns the unit vectors of items of a modality: of texts, or of uploaded files.

        Args:
          of: the modality.
          items: by the field that each came in, for messages.
          space: that they are embedded into.

        Raises:
          Refusal: as `view_of` does; 422 a modality that the space has not or that is not read from
            files, or a broken file; 429 a full queue.
        """
        self.space(of, space)
        rows = await self._decode(self._read, of, items)
        return np.asarray(await self._work(self._embedder(of, space), rows))

    def _read(self, of: str, items: Mapping[str, str | bytes]) -> list[Windows]:
        """Returns what the model reads of texts or of uploaded files."""
        rows = []
        for place, data in items.items():
            item: Any = data
            try:
                if isinstance(data, bytes):
                    self.model.in_files(of)
                    if of == "image":
                        item = view_of(self.model, data, self.limits, place)
                rows.append(self.model.read_windows(item, of))
            except ValueError as error:
                raise Refusal(422, "broken_item", f"{place}: {error}") from error
        return rows

    async def similarities(
        self, of: str, data: bytes, classes: Sequence[str], templates: Sequence[str] | None
    ) -> Float[np.ndarray, " C"]:
        """Returns an item's cosine similarity with each class.

        Raises:
          Refusal: 422 wrong or too many sentences, or no contrast with texts; 429 a full queue.
        """
        sentences = templates_of(of) if templates is None else templates
        try:
            texts = filled(sentences, classes)
        except ValueError as error:
            raise Refusal(422, "wrong_template", str(error)) from error
        if len(texts) > (most := self.limits.sentences):
            message = f"{len(classes)} classes in {len(sentences)} templates: at most {most} in all"
            raise Refusal(422, "too_many", message)
        space, named = self.space(of), {f"classes[{i}]": text for i, text in enumerate(texts)}
        item, embedded = await asyncio.gather(
            self.embed(of, {_field(of): data}, space), self.embed("text", named, space)
        )
        return item[0] @ class_embeddings(lambda _: embedded, classes, sentences).T

    def searched_by(self) -> dict[str, list[str]]:
        """Returns the suffixes of files that a search can start from, by modality."""
        if self.index is None:
            return {}
        space, task = self.index.space(self.model), self.model.task
        return {
            name: sorted(modality.suffixes)
            for name, modality in task.modalities.items()
            if hasattr(modality, "read") and space in [each.name for each in task.contrasts(name)]
        }

    async def search(
        self, given: Sequence[tuple[str, str | bytes]], count: int, kind: str
    ) -> list[Hit]:
        """Returns what is nearest to an item, or to the mean of several; the best first.

        Args:
          given: modality and text, or file's bytes, of each.
          count: how many are wanted.
          kind: of what is wanted: 'text', or the modality of the index.

        Raises:
          Refusal: 422 the index holds no such kind, a modality that is not embedded as its items
            are, or items that cancel out; 429 a full queue.
        """
        index = self.index
        assert index is not None
        if kind not in (index.of, "text"):
            message = f"kind: Input should be {index.of!r} or 'text'"
            raise Refusal(422, "wrong_fields", message)
        if kind not in index.nearest:
            message = f"this index holds {noun(index.of)} alone: ask for kind {index.of}"
            raise Refusal(422, "no_texts", message)
        space = index.space(self.model)
        parts = [await self.embed(of, {_field(of): data}, space) for of, data in given]
        vectors = np.concatenate(parts)

        def find() -> list[Hit]:
            return index.search(mixed(vectors, [1.0] * len(vectors)), count, kind)

        try:
            return await self._decode(find)
        except ValueError as error:
            raise Refusal(422, "no_direction", str(error)) from error

    async def picture(self, number: int) -> bytes:
        """Returns a picture of the index as a small JPEG.

        Raises:
          Refusal: 404 there is none.
        """

        def make() -> bytes:
            assert self.index is not None
            return shown(self.index.read_picture(number))

        try:
            return await self._decode(make)
        except (IndexError, FileNotFoundError) as error:
            raise Refusal(404, "no_picture", str(error)) from error
        except ImageError as error:
            message = f"picture {number} is not there as it was indexed"
            raise Refusal(404, "no_picture", message) from error

    async def attention(
        self, view: View, prompt: str, text: str
    ) -> tuple[list[str], Float[np.ndarray, "words rows cols"]]:
        """Returns the words of a text, and a map over the patches for each.

        Raises:
          Refusal: 422 a text without words, 429 a full queue.
        """
        try:
            return (await self._work(self._attention, [(view, prompt, text)]))[0]
        except ValueError as error:
            raise Refusal(422, "wrong_text", str(error)) from error

    def _attention(self, asked: Sequence[tuple[View, str, str]]) -> list[Any]:
        assert self.attend is not None
        return [self.attend(self.model, *each) for each in asked]

    async def _work(self, work: Any, items: Sequence[Any]) -> Any:
        try:
            future = self.worker.submit(work, items)
        except queue.Full as error:
            raise busy("too many requests wait for the model") from error
        return await asyncio.wrap_future(future)

    async def _decode(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, function, *arguments)


def _field(of: str) -> str:
    """Returns the field in which one item of a modality comes."""
    return of if of in ("image", "text") else "item"


def missing(model: LoadedModel, index: SearchIndex | None) -> dict[str, str]:
    """Returns, by route, why this model or server cannot serve it."""
    task = model.task
    trained = ", ".join(objective.name for objective in task.objectives)
    without: dict[str, str] = {}
    if "image" not in task.modalities:
        why = f"this run reads no images: it is of {' and '.join(task.modalities)} alone"
        without |= dict.fromkeys(("/caption", "/answer", "/attention"), why)
    if task.model.options.dropping.keep < 1:
        without["/attention"] = "this run drops patches (model.dropping): not all layers have them"
    if not model.predictor.can(Captioning):
        why = f"this run cannot write: it was trained on {trained}"
        without |= dict.fromkeys(("/caption", "/answer", "/attention"), why)
    if not model.predictor.task.contrasts():
        why = f"this run cannot embed: it was trained on {trained}"
        without |= dict.fromkeys(("/embed", "/classify", "/search"), why)
    elif all(len(contrast.between) == 1 for contrast in model.predictor.task.contrasts()):
        why = "this run embeds texts alone"
        without |= dict.fromkeys(("/classify", "/search"), why)
    elif not model.predictor.task.contrasts("text"):
        without["/classify"] = f"this run embeds no texts, which name classes: it has {trained}"
    if index is None:
        why = "the server was started without --index"
        without |= {"/search": why, "/pictures/{number}": why}
    elif index.of != "image":
        without["/pictures/{number}"] = f"the index is of {noun(index.of)}"
    return without
