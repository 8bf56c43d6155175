"""The device's side of continuous batching: a fixed number of texts, and cached images.

All shapes are fixed but two: how many enter at once (`ENTERING`) and how wide their prompts are
(`Predictor.prompts`). Reading prompts is compiled once for each combination, and what follows once
for each number that enter, whatever their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt8

from unified_mm.inference.decoding import Decoding
from unified_mm.inference.generate import DecodeState, in_its_form
from unified_mm.inference.predictor import Predictor
from unified_mm.inference.sampling import make_sampling, sampling_arrays
from unified_mm.nn.attention.cache import Cache

ENTERING = (1, 4)  # texts, or images, that are read at once
STOPS = 8  # tokens that may end a text


@dataclass(frozen=True)
class Entry:
    """A text that enters.

    Attributes:
      slot: the slot that it is written in.
      image: the row of its image.
      prompt: the beginning of the text.
      decoding: how it is decoded.
    """

    slot: int
    image: int
    prompt: str
    decoding: Decoding


class Slots:
    """Slots for `count` texts that are being written, and `images` rows for images these are about.

    Each text has room for the longest prompt and then for the longest answer; answers are written
    round a ring, so that all are written at the same slot of the cache whenever they began.
    """

    def __init__(self, predictor: Predictor, count: int, images: int) -> None:
        self.predictor = predictor
        self.length = predictor.task.modalities["text"].length
        self.writer = predictor.writer(self.length - 1)
        cache: Cache = self._empty(self._read_images, self._views([], images))
        self.images = predictor.replicated(written(cache, cache.slots))
        prompts, inputs = self._arrays([], count)
        read = jax.eval_shape(self._read_prompts, predictor.params, self.images, prompts)
        state: DecodeState = self._empty(lambda _, *args: self._begin(*args), read, inputs)
        cache = state.read_state.cache
        cache = written(cache, cache.slots - self.writer.cache_room)
        read_state = state.read_state.replace(cache=cache)  # type: ignore[attr-defined]
        state = state.replace(read_state=read_state, done=jnp.ones(count, bool))  # type: ignore[attr-defined]
        self.state: DecodeState = predictor.replicated(state)

    def read(self, views: Sequence[UInt8[np.ndarray, "size size 3"]], rows: Sequence[int]) -> None:
        """Reads images into the given rows, at most `ENTERING[-1]` of them."""

        def read(params: Any, images: Cache, inputs: Any) -> Cache:
            rows = inputs.pop("rows")
            return images.put(rows, self._read_images(params, inputs))

        size = entering(len(rows))
        inputs = self._views(views, size) | {"rows": filled(rows, size)}
        self.images = self.predictor.call("engine reads", read, self.images, inputs, donated=(1,))

    def enter(
        self, entries: Sequence[Entry]
    ) -> tuple[Int[np.ndarray, " entries"], Bool[np.ndarray, " entries"]]:
        """Reads the prompts of at most `ENTERING[-1]` texts and writes their first tokens.

        Returns:
          The tokens, and which texts are done with these.

        Raises:
          ValueError: a prompt or a stop that `check` refuses.
        """

        def enter(_: Any, state: DecodeState, read: Any, inputs: Any) -> Any:
            begun = self._begin(read, inputs)
            return state.put(inputs["slots"], begun), begun.token, begun.done

        prompts, inputs = self._arrays(entries, entering(len(entries)))
        read = self.predictor.call("engine reads prompts", self._read_prompts, self.images, prompts)
        self.state, token, done = self.predictor.call(
            "engine enters", enter, self.state, read, inputs, donated=(1,)
        )
        token, done = jax.device_get((token, done))
        return token[: len(entries)], done[: len(entries)]

    def step(self) -> tuple[Int[np.ndarray, " slots"], Bool[np.ndarray, " slots"]]:
        """Writes one more token of each text that is not done.

        Returns:
          The tokens, and which texts are done.
        """

        def step(params: Any, state: DecodeState) -> Any:
            state = self.writer.decode_step(params, state)
            return state, state.token, state.done

        self.state, token, done = self.predictor.call(
            "engine steps", step, self.state, donated=(1,)
        )
        return jax.device_get((token, done))

    def check(self, prompt: str, decoding: Decoding) -> None:
        """Checks that a text can be written here, before anything is computed.

        Raises:
          ValueError: several texts or beams, too many stops, or a prompt that leaves no room.
        """
        if decoding.beams > 1 or decoding.samples > 1:
            raise ValueError("one text is written for each request: give neither beams nor samples")
        stops = decoding.stop_ids(self.predictor.task.tokenizer)
        if len(stops) > STOPS:
            raise ValueError(f"stop: {len(stops) - 1} tokens, at most {STOPS - 1} can be watched")
        self.predictor.prompts([prompt])

    def _read_prompts(self, params: Any, images: Cache, prompts: Any) -> Any:
        """Reads prompts beside images that were read before."""
        prefix = images.select(prompts["images"])
        room = self.length + self.writer.cache_room  # for the longest prompt, then the ring
        return self.writer.read_beside(params, prefix, prompts["text"], room)

    def _begin(self, read: Any, inputs: Any) -> DecodeState:
        """Returns the state of texts with one token, after prompts that were read."""
        logits, read_state = read
        sampling = make_sampling(**inputs["sampling"])
        return self.writer.first_token(
            logits, read_state, inputs["max_tokens"], inputs["stop"], sampling
        )

    def _read_images(self, params: Any, inputs: Any) -> Cache:
        model, view = self.writer.model, self.writer.view

        def read(module: Any) -> Cache:
            return in_its_form(model, module.prefix(inputs, view))

        cache: Any = model.apply({"params": params}, method=read)
        return cache

    def _views(self, views: Sequence[Any], size: int) -> dict[str, Any]:
        """Returns a batch of context with these images, filled up with the first one."""
        batch = self.predictor.task.example_batch(size)
        del batch["text"]
        if len(views):
            pixels = np.stack([*views, *[views[0]] * (size - len(views))])
            batch["image"] = {"pixels": pixels, "present": np.ones(size, bool)}
        return batch

    def _arrays(self, entries: Sequence[Entry], size: int) -> tuple[Any, Any]:
        """Returns what `_read_prompts` and `enter` take, filled up with the first entry."""
        entries = list(entries) or [Entry(0, 0, "x", Decoding())]
        entries += entries[:1] * (size - len(entries))
        text, used = self.predictor.prompts([entry.prompt for entry in entries])
        stop = np.full((size, STOPS), -1, np.int32)
        for row, entry in enumerate(entries):
            ids = entry.decoding.stop_ids(self.predictor.task.tokenizer)
            stop[row, : len(ids)] = ids
        wanted = [entry.decoding.tokens or self.length for entry in entries]
        rows = [sampling_arrays(entry.decoding, 1) for entry in entries]
        images = np.array([entry.image for entry in entries], np.int32)
        return {"images": images, "text": text}, {
            "slots": np.array([entry.slot for entry in entries], np.int32),
            "max_tokens": np.minimum(self.length - used, wanted).astype(np.int32),
            "stop": stop,
            "sampling": jax.tree.map(lambda *each: np.concatenate(each), *rows),
        }

    def _empty(self, function: Any, *args: Any) -> Any:
        """Returns what a function of parameters returns, all zero."""
        shapes = jax.eval_shape(function, self.predictor.params, *args)
        # One program, where each array would be one by itself.
        return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))()


def written(cache: Cache, slots: int) -> Cache:
    """Returns a cache as though so many of its slots were written."""
    changed: Cache = cache.replace(length=jnp.array(slots, jnp.int32))  # type: ignore[attr-defined]
    return changed


def entering(count: int) -> int:
    """Returns the smallest compiled size that is at least `count`."""
    return next(size for size in ENTERING if size >= count)


def filled(rows: Sequence[int], size: int) -> Int[np.ndarray, " rows"]:
    """Fills up row numbers to `size` by repeating the first one."""
    return np.array([*rows, *[rows[0]] * (size - len(rows))], np.int32)
