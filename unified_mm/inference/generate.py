"""Writing text on the cache, token by token: one value, `Draft`, and one function, `advance`.

`generate` runs it in a loop on the device; streams and the engine take single, donated steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from unified_mm.inference.sampling import Sampling, draw
from unified_mm.models.unified import UnifiedModel, text_group
from unified_mm.nn.attention.cache import Cache
from unified_mm.nn.attention.rules import Stream
from unified_mm.nn.tokens import PLACEMENT

Text = Mapping[str, Array]


@struct.dataclass
class Reading:
    """How far texts have been read, a row each.

    Attributes:
      cache: with the text that was read, and room for more.
      place: int32 [B], of the next token in its text.
      where: of the next token in its document, int32 [B] each (`PLACEMENT`); empty without one.
    """

    cache: Cache
    place: Any
    where: dict[str, Any]

    def select(self, rows: Int[Array, " R"]) -> Reading:
        """The given rows."""
        where = {key: value[rows] for key, value in self.where.items()}
        return Reading(self.cache.select(rows), self.place[rows], where)

    def put(self, rows: Int[Array, " R"], other: Reading) -> Reading:
        """With other readings in place of the given rows."""
        return Reading(
            self.cache.put(rows, other.cache),
            self.place.at[rows].set(other.place),
            {key: value.at[rows].set(other.where[key]) for key, value in self.where.items()},
        )


@struct.dataclass
class Draft:
    """Texts that are being written, a row each.

    Attributes:
      reading: of all but the last token.
      token: int32 [B], the last one, drawn and not yet read.
      written: int32 [B, W], what was written so far, its end included, padded.
      count: int32 [B], how many tokens that is.
      most: int32 [B], how many it may be, at most W.
      done: bool [B].
      likelihood: float32 [B], the sum of its tokens' log-likelihoods in nats, however drawn.
      stop: int32 [B, E], the tokens that end a text; -1 where there are fewer.
      sampling: how tokens are drawn.
    """

    reading: Reading
    token: Any
    written: Any
    count: Any
    most: Any
    done: Any
    likelihood: Any
    stop: Any
    sampling: Sampling

    def put(self, rows: Int[Array, " R"], other: Draft) -> Draft:
        """With other drafts, of as much room, in place of the given rows."""

        def put(mine: Any, others: Any) -> Any:
            return jax.tree.map(lambda x, y: x.at[rows].set(y), mine, others)

        reading = self.reading.put(rows, other.reading)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del fields["reading"]
        changed = {name: put(value, getattr(other, name)) for name, value in fields.items()}
        return Draft(reading=reading, **changed)


def generate(model: UnifiedModel, params: Any, draft: Draft, stream: Stream, padding: int) -> Draft:
    """The draft once every text has ended or is full."""
    return jax.lax.while_loop(
        lambda draft: ~draft.done.all(),
        lambda draft: advance(model, params, draft, stream, padding),
        draft,
    )


def begin(
    model: UnifiedModel,
    params: Any,
    batch: Mapping[str, Text],
    stream: Stream,
    *,
    most: Int[Array, " B"],
    stop: Int[Array, "B E"],
    sampling: Sampling,
    room: int,
    padding: int,
) -> Draft:
    """Reads context and prompts and draws the first token of each text.

    Args:
      model, params: of the run.
      batch: the context modalities, and as `text` what each text starts with (`ids`, `valid`
        [B, T]: at least one token, then padding; documents carry their placement too).
      stream: the objective's that the model learned to write by.
      most: how many tokens each text may have.
      stop: tokens that end it; -1 where there are fewer.
      sampling: a row for each row of what comes out: of `samples` texts for each prompt, where it
        has so many times B rows, and so have `most` and `stop`.
      room: W, how many tokens any may have.
      padding: the id of padding.
    """
    logits, reading = read_prompts(model, params, batch, stream, room)
    copies = most.shape[0] // logits.shape[0]
    if copies > 1:
        rows = jnp.repeat(jnp.arange(logits.shape[0]), copies)
        logits, reading = logits[rows], reading.select(rows)
    return first(logits, reading, most, stop, sampling, room, padding)


def first(
    logits: Float[Array, "B V"],
    reading: Reading,
    most: Int[Array, " B"],
    stop: Int[Array, "B E"],
    sampling: Sampling,
    room: int,
    padding: int,
) -> Draft:
    """Drafts of one token, by the scores after their prompts."""
    rows = logits.shape[0]
    most = jnp.minimum(most, room)
    blank = Draft(
        reading=reading,
        token=jnp.full(rows, padding, jnp.int32),
        written=jnp.full((rows, room), padding, jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        most=most,
        done=most < 1,
        likelihood=jnp.zeros(rows, jnp.float32),
        stop=stop,
        sampling=sampling,
    )
    return write(blank, logits, padding)


def advance(model: UnifiedModel, params: Any, draft: Draft, stream: Stream, padding: int) -> Draft:
    """Reads the last token of each text and draws the next one. What is done stays as it is."""
    logits, reading = read(
        model, params, draft.reading, draft.token, stream, draft.written.shape[1]
    )
    return write(draft.replace(reading=reading), logits, padding)  # type: ignore[attr-defined]


def write(draft: Draft, logits: Float[Array, "B V"], padding: int) -> Draft:
    """The draft with one more token, drawn by its scores."""
    rows = jnp.arange(logits.shape[0])
    drawn = draw(logits, draft.sampling, draft.count)
    gained = logits[rows, drawn] - jax.nn.logsumexp(logits, axis=-1)
    token = jnp.where(draft.done, padding, drawn)
    count = draft.count + (~draft.done).astype(jnp.int32)
    ended = (drawn[:, None] == draft.stop).any(1) | (count >= draft.most)
    # What is done writes past the end, that is, nowhere.
    at = jnp.where(draft.done, draft.written.shape[1], draft.count)
    return draft.replace(  # type: ignore[attr-defined]
        token=token,
        written=draft.written.at[rows, at].set(token, mode="drop"),
        count=count,
        likelihood=draft.likelihood + jnp.where(draft.done, 0.0, gained),
        done=draft.done | ended,
    )


def read_prompts(
    model: UnifiedModel, params: Any, batch: Mapping[str, Text], stream: Stream, room: int
) -> tuple[Float[Array, "B V"], Reading]:
    """Context and prompts, and room for more: the scores of what follows, and how far it is."""
    prompt = batch["text"]

    def start(module: UnifiedModel) -> Any:
        x, cache = module.prefill(batch, stream, room)
        return module.logits(last_token(x, prompt["valid"]))[:, 0], in_its_form(model, cache)

    logits, cache = _apply(model, params, start)
    return logits, Reading(cache, *after(prompt))


def read_beside(
    model: UnifiedModel, params: Any, prefix: Cache, prompt: Text, stream: Stream, room: int
) -> tuple[Float[Array, "B V"], Reading]:
    """The same beside a context that was read before (`UnifiedModel.prefix`)."""

    def start(module: UnifiedModel) -> Any:
        group = text_group(stream, room)
        x, cache = module.extend(prefix.reserve(group), prompt, stream)
        return module.logits(last_token(x, prompt["valid"]))[:, 0], cache

    logits, cache = _apply(model, params, start)
    return logits, Reading(cache, *after(prompt))


def read(
    model: UnifiedModel,
    params: Any,
    reading: Reading,
    token: Int[Array, " B"],
    stream: Stream,
    room: int,
) -> tuple[Float[Array, "B V"], Reading]:
    """One more token of each text: the scores of what follows, and how far it is.

    The last `room` slots of the cache are a ring: a text that began later than the others goes on
    where they began, and none is longer than the ring.
    """
    rows = token.shape[0]
    text = {
        "ids": token[:, None],
        "valid": jnp.ones((rows, 1), bool),
        "present": jnp.ones(rows, bool),
        "place": reading.place[:, None],
        **{key: value[:, None] for key, value in reading.where.items()},
    }

    def extend(module: UnifiedModel) -> Any:
        x, cache = module.extend(reading.cache, text, stream)
        return module.logits(x)[:, 0], cache

    logits, cache = _apply(model, params, extend)
    length = jnp.where(cache.length < cache.slots, cache.length, cache.slots - room)
    where = dict(reading.where)
    if "position" in where:
        where["position"] = where["position"] + 1
    return logits, Reading(cache.replace(length=length), reading.place + 1, where)


def in_its_form(model: UnifiedModel, cache: Cache) -> Cache:
    """A cache as the model's options want it kept."""
    return cache.in_int8() if model.options.cache == "int8" else cache


def last_token(x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B 1 D"]:
    """The embedding of the last token that is there."""
    last = jnp.maximum(valid.sum(1) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)


def after(prompt: Text) -> tuple[Int[Array, " B"], dict[str, Array]]:
    """Where the token after a prompt belongs: in its text, and in its document if it has one."""
    length = prompt["valid"].sum(1)
    last = jnp.maximum(length - 1, 0)[:, None]
    where = {
        key: jnp.take_along_axis(prompt[key], last, axis=1)[:, 0]
        for key in PLACEMENT
        if key in prompt
    }
    if "position" in where:
        where["position"] = where["position"] + 1
    if "place" not in prompt:
        return length.astype(jnp.int32), where
    return jnp.take_along_axis(prompt["place"], last, axis=1)[:, 0] + 1, where


def _apply(model: UnifiedModel, params: Any, function: Any) -> Any:
    return model.apply({"params": params}, method=function)
