"""Autoregressive decoding with a cache: a `TextWriter` begins a `DecodeState` and adds tokens.

`TextWriter.generate` writes in a loop on the device; streaming and the engine take single, donated
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from unified_mm.inference.sampling import Sampling, draw, make_sampling
from unified_mm.models.unified import UnifiedModel, text_group
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import View
from unified_mm.nn.tokens import POSITION_KEYS
from unified_mm.nn.transformer import LEFT

Text = Mapping[str, Array]
WRITING = "writing"  # the scope of the loop that writes, a token each time but the first


@struct.dataclass
class Early:
    """How the tokens of texts leave the layers early, a text a row.

    Attributes:
      threshold: float32 [B], the confidence at which a token leaves at an exit.
      left: float32 [B, exits], tokens that had left after each exit; those of a prompt apart.
    """

    threshold: Any
    left: Any


@struct.dataclass
class ReadState:
    """The state of texts that are read into a cache, a row each.

    Attributes:
      cache: keys and values of the context and the text that was read, with room for more.
      place: int32 [B], index of the next token in its text.
      where: int32 [B] each, `POSITION_KEYS` of the next token; empty where the batch holds no
        documents.
      early: how their tokens leave the layers early; None where all layers are run.
    """

    cache: Cache
    place: Any
    where: dict[str, Any]
    early: Early | None = None

    def select(self, rows: Int[Array, " rows"]) -> ReadState:
        """Returns the given rows."""
        own = jax.tree.map(lambda x: x[rows], (self.place, self.where, self.early))
        return ReadState(self.cache.select(rows), *own)

    def put(self, rows: Int[Array, " rows"], other: ReadState) -> ReadState:
        """Returns the state with the rows of `other` in place of the given ones."""
        own, others = ((x.place, x.where, x.early) for x in (self, other))
        own = jax.tree.map(lambda x, y: x.at[rows].set(y), own, others)
        return ReadState(self.cache.put(rows, other.cache), *own)


@struct.dataclass
class DecodeState:
    """The state of texts that are being written, a row each.

    Attributes:
      read_state: the state after all but the last token are read.
      token: int32 [B], the last one, drawn and not yet read.
      written: int32 [B, S], what was written so far, its end included, padded.
      count: int32 [B], how many tokens that is.
      max_tokens: int32 [B], how many it may be, at most S.
      done: bool [B], whether the text has ended or is full.
      likelihood: float32 [B], the sum of its tokens' log-likelihoods in nats, however drawn.
      stop: int32 [B, stops], the tokens that end a text; -1 where there are fewer.
      sampling: how tokens are drawn.
    """

    read_state: ReadState
    token: Any
    written: Any
    count: Any
    max_tokens: Any
    done: Any
    likelihood: Any
    stop: Any
    sampling: Sampling

    def put(self, rows: Int[Array, " rows"], other: DecodeState) -> DecodeState:
        """Returns the state with the rows of `other`, of equal S, in place of the given ones."""

        changed = {
            name: jax.tree.map(lambda x, y: x.at[rows].set(y), value, getattr(other, name))
            for name, value in vars(self).items()
            if name != "read_state"
        }
        return DecodeState(read_state=self.read_state.put(rows, other.read_state), **changed)


@dataclass(frozen=True)
class TextWriter:
    """A model that writes texts; its methods are pure functions of parameters and states.

    Attributes:
      model: the model.
      view: the objective's view that it learned to write by.
      padding: the id of padding.
      cache_room: S, how many tokens any text may have after its prompt.
    """

    model: UnifiedModel
    view: View
    padding: int
    cache_room: int

    def begin(self, params: Any, inputs: Mapping[str, Any]) -> DecodeState:
        """Does what `start` does, with its arguments as `predictor.inputs_of` makes them."""
        given = dict(inputs)
        sampling = make_sampling(**given.pop("sampling"))
        return self.start(params, **given, sampling=sampling)

    def start(
        self,
        params: Any,
        batch: Mapping[str, Text],
        max_tokens: Int[Array, " B"],
        stop: Int[Array, "B stops"],
        sampling: Sampling,
        threshold: Float[Array, " B"] | None = None,
    ) -> DecodeState:
        """Reads context and prompts and draws the first token of each text.

        Args:
          params: the model's parameters.
          batch: the context modalities, and as `text` what each text starts with (`ids`, `valid`
            [B, T]: at least one token, then padding; documents carry `POSITION_KEYS` too).
          max_tokens: how many tokens each text may have.
          stop: tokens that end it; -1 where there are fewer.
          sampling: how each text is drawn. It, `max_tokens` and `stop` have as many rows as the
            batch, or so many times more: then that many texts are written for each prompt.
          threshold: the confidence at which tokens after the first leave the layers early, of as
            many rows; None runs all layers.
        """
        logits, read_state = self.read_prompts(params, batch)
        copies = max_tokens.shape[0] // logits.shape[0]
        if copies > 1:
            rows = jnp.repeat(jnp.arange(logits.shape[0]), copies)
            logits, read_state = logits[rows], read_state.select(rows)
        if threshold is not None:
            exits = len(self.model.options.exits)
            early = Early(threshold, jnp.zeros((*threshold.shape, exits)))
            read_state = replace(read_state, early=early)
        return self.first_token(logits, read_state, max_tokens, stop, sampling)

    def first_token(
        self,
        logits: Float[Array, "B V"],
        read_state: ReadState,
        max_tokens: Int[Array, " B"],
        stop: Int[Array, "B stops"],
        sampling: Sampling,
    ) -> DecodeState:
        """Draws the first token of each text, by the logits after its prompt."""
        rows = logits.shape[0]
        max_tokens = jnp.minimum(max_tokens, self.cache_room)
        blank = DecodeState(
            read_state=read_state,
            token=jnp.full(rows, self.padding, jnp.int32),
            written=jnp.full((rows, self.cache_room), self.padding, jnp.int32),
            count=jnp.zeros(rows, jnp.int32),
            max_tokens=max_tokens,
            done=max_tokens < 1,
            likelihood=jnp.zeros(rows, jnp.float32),
            stop=stop,
            sampling=sampling,
        )
        return self.append(blank, logits)

    def generate(self, params: Any, state: DecodeState) -> DecodeState:
        """Writes tokens until every text has ended or is full, and returns the last state."""
        with jax.named_scope(WRITING):
            return jax.lax.while_loop(
                lambda state: ~state.done.all(),
                lambda state: self.decode_step(params, state),
                state,
            )

    def decode_step(self, params: Any, state: DecodeState) -> DecodeState:
        """Reads the last token of each text and draws the next; those that are done stay as is."""
        early = state.read_state.early
        if early is not None:  # nothing waits for what is done
            early = replace(early, threshold=jnp.where(state.done, -jnp.inf, early.threshold))
        reading = replace(state.read_state, early=early)
        logits, read_state = self.read_token(params, reading, state.token)
        # What is done stays at its place: beyond the last one there is no embedding.
        before = state.read_state
        place = jnp.where(state.done, before.place, read_state.place)
        early, new = before.early, read_state.early
        if early is not None and new is not None:
            early = replace(early, left=jnp.where(state.done[:, None], early.left, new.left))
        read_state = replace(read_state, place=place, early=early)
        return self.append(state.replace(read_state=read_state), logits)  # type: ignore[attr-defined]

    def append(self, state: DecodeState, logits: Float[Array, "B V"]) -> DecodeState:
        """Appends one token to each text, drawn by its logits."""
        rows = jnp.arange(logits.shape[0])
        drawn = draw(logits, state.sampling, state.count)
        gained = logits[rows, drawn] - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(state.done, self.padding, drawn)
        count = state.count + (~state.done).astype(jnp.int32)
        ended = (drawn[:, None] == state.stop).any(1) | (count >= state.max_tokens)
        # What is done writes past the end, that is, nowhere.
        at = jnp.where(state.done, state.written.shape[1], state.count)
        return state.replace(  # type: ignore[attr-defined]
            token=token,
            written=state.written.at[rows, at].set(token, mode="drop"),
            count=count,
            likelihood=state.likelihood + jnp.where(state.done, 0.0, gained),
            done=state.done | ended,
        )

    def read_prompts(
        self, params: Any, batch: Mapping[str, Text]
    ) -> tuple[Float[Array, "B V"], ReadState]:
        """Reads context and prompts into a cache with room for `cache_room` more tokens.

        Returns:
          Logits of the next token, and the state of what was read.
        """
        prompt = batch["text"]

        def read_first(module: UnifiedModel) -> Any:
            x, cache = module.prefill(batch, self.view, self.cache_room)
            return next_logits(module, x, prompt), in_its_form(self.model, cache)

        logits, cache = self._apply(params, read_first)
        return logits, ReadState(cache, *after(prompt))

    def read_beside(
        self, params: Any, prefix: Cache, prompt: Text, room: int
    ) -> tuple[Float[Array, "B V"], ReadState]:
        """Reads prompts beside a context that was read before (`UnifiedModel.prefix`).

        Args:
          params: the model's parameters.
          prefix: the context.
          prompt: as `start` takes it in `batch`.
          room: slots of the cache for the prompt and what is written.

        Returns:
          As `read_prompts`.
        """

        def read_first(module: UnifiedModel) -> Any:
            begins = module.text_begins(prefix, self.view)
            reserved = prefix.reserve(text_group(self.view, room, begins))
            x, cache = module.extend(reserved, prompt, self.view)
            return next_logits(module, x, prompt), cache

        logits, cache = self._apply(params, read_first)
        return logits, ReadState(cache, *after(prompt))

    def read_token(
        self, params: Any, read_state: ReadState, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], ReadState]:
        """Reads one more token of each text.

        The last `cache_room` slots of the cache are a ring: a text that began later than the others
        goes on where they began, and none is longer than the ring.

        Returns:
          Logits of the next token, and the state of what was read.
        """
        rows = token.shape[0]
        text = {
            "ids": token[:, None],
            "valid": jnp.ones((rows, 1), bool),
            "present": jnp.ones(rows, bool),
            "text_position": read_state.place[:, None],
            **{key: value[:, None] for key, value in read_state.where.items()},
        }

        early = read_state.early

        def leave(x: Float[Array, "B T D"]) -> Array:
            assert early is not None
            logits: Any = self._apply(params, partial(UnifiedModel.exit_logits, x=x))
            return confidence(logits[:, -1]) >= early.threshold

        def extend(module: UnifiedModel) -> Any:
            leaves: Any = {} if early is None else {"leave": leave}
            x, cache = module.extend(read_state.cache, text, self.view, **leaves)
            return module.logits(x)[:, 0], cache

        if early is None:
            logits, cache = self._apply(params, extend)
        else:
            found: Any = self.model.apply({"params": params}, method=extend, mutable=[LEFT])
            (logits, cache), sown = found
            (left,) = jax.tree.leaves(sown)
            early = replace(early, left=early.left + left.astype(jnp.float32))
        ring = cache.slots - self.cache_room
        length = jnp.where(cache.length < cache.slots, cache.length, ring)
        where = dict(read_state.where)
        if "position" in where:
            where["position"] = where["position"] + 1
        cache = cache.replace(length=length)
        return logits, ReadState(cache, read_state.place + 1, where, early)

    def _apply(self, params: Any, function: Any) -> Any:
        return self.model.apply({"params": params}, method=function)


def confidence(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """Returns how far the likeliest token's probability is above the next one's, in [0, 1]."""
    likely = jax.nn.softmax(logits)
    best = jax.nn.one_hot(likely.argmax(-1), likely.shape[-1], dtype=bool)
    return likely.max(-1) - jnp.where(best, 0, likely).max(-1)


def in_its_form(model: UnifiedModel, cache: Cache) -> Cache:
    """Returns a cache in the form that the model's options ask for."""
    return cache.in_int8() if model.options.cache == "int8" else cache


def next_logits(model: UnifiedModel, x: Float[Array, "B T D"], prompt: Text) -> Float[Array, "B V"]:
    """Returns the logits of the token after each prompt."""
    last = jnp.maximum(prompt["valid"].sum(1) - 1, 0)
    return model.logits(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0]


def after(prompt: Text) -> tuple[Int[Array, " B"], dict[str, Array]]:
    """Returns where the token after a prompt belongs: in its text, and in its document if any."""
    length = prompt["valid"].sum(1)
    last = jnp.maximum(length - 1, 0)[:, None]
    where = {
        key: jnp.take_along_axis(prompt[key], last, axis=1)[:, 0]
        for key in POSITION_KEYS
        if key in prompt
    }
    if "position" in where:
        where["position"] = where["position"] + 1
    if "text_position" not in prompt:
        return length.astype(jnp.int32), where
    return jnp.take_along_axis(prompt["text_position"], last, axis=1)[:, 0] + 1, where
