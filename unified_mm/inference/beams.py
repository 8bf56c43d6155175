"""Beam search: texts of high log-likelihood as wholes, rather than token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from unified_mm.inference.generate import ReadState, Text, TextWriter

NEVER = -1e30  # log-likelihood of a beam that does not exist; finite, so that sums stay numbers


@struct.dataclass
class Beams:
    """The state of a beam search over B texts, each with the same number of beams.

    Attributes:
      read_state: how far the live beams are read, all but their last tokens; B * beams rows.
      step: int32 [], tokens that each live beam has.
      live: int32 [B, beams, S], tokens of the live beams, padded.
      live_sum: float32 [B, beams], log-likelihoods of the live beams.
      ended: int32 [B, beams, S], tokens of the best texts that have ended, padded.
      ended_sum: float32 [B, beams], their log-likelihoods.
      ended_score: float32 [B, beams], the scores that they are compared by.
    """

    read_state: ReadState
    step: Any
    live: Any
    live_sum: Any
    ended: Any
    ended_sum: Any
    ended_score: Any


def beam_search(
    writer: TextWriter,
    params: Any,
    batch: Mapping[str, Text],
    *,
    max_tokens: Int[Array, " B"],
    stop: Int[Array, "B stops"],
    beams: int,
    length_penalty: float | Float[Array, ""],
) -> tuple[Int[Array, "B beams S"], Float[Array, "B beams"]]:
    """Returns the best texts, best first, by log-likelihood / length ** length_penalty.

    A text is as long as its tokens, its end included. The search of a text ends where no live beam
    could, at its longest, be better than the worst of those that have ended.

    Args:
      writer: the model, and the most tokens that any text may have.
      params, batch: as `TextWriter.start` takes them.
      max_tokens, stop: as there, a row for each example.
      beams: beams of each text, which is also how many texts are returned.
      length_penalty: the exponent of the length.

    Returns:
      The tokens, padded, and their log-likelihoods in nats: -inf where there are fewer texts.
    """
    logits, read_state = writer.read_prompts(params, batch)
    texts = logits.shape[0]
    max_tokens = jnp.minimum(max_tokens, writer.cache_room)
    blank = jnp.full((texts, beams, writer.cache_room), writer.padding, jnp.int32)
    nothing = jnp.full((texts, beams), NEVER, jnp.float32)
    start = Beams(
        read_state=read_state.select(jnp.repeat(jnp.arange(texts), beams)),
        step=jnp.zeros((), jnp.int32),
        live=blank,
        live_sum=nothing.at[:, 0].set(jnp.where(max_tokens > 0, 0.0, NEVER)),
        ended=blank,
        ended_sum=nothing,
        ended_score=nothing,
    )

    def undecided(state: Beams) -> Array:
        hope = score(state.live_sum[:, 0], jnp.maximum(max_tokens, 1), length_penalty)
        alive = state.live_sum[:, 0] > NEVER / 2
        return (alive & (hope > state.ended_score[:, -1])).any()

    def decode_step(state: Beams) -> Beams:
        token = jax.lax.dynamic_index_in_dim(state.live, state.step - 1, axis=2, keepdims=False)
        logits, read_state = writer.read_token(params, state.read_state, token.reshape(-1))
        state = state.replace(read_state=read_state)  # type: ignore[attr-defined]
        return choose(state, logits, max_tokens, stop, length_penalty)

    logits = jnp.repeat(logits, beams, axis=0)
    found = choose(start, logits, max_tokens, stop, length_penalty)
    found = jax.lax.while_loop(undecided, decode_step, found)
    return found.ended, jnp.where(found.ended_score > NEVER / 2, found.ended_sum, -jnp.inf)


def choose(
    state: Beams,
    logits: Float[Array, "rows V"],
    max_tokens: Int[Array, " B"],
    stop: Int[Array, "B stops"],
    length_penalty: float | Float[Array, ""],
) -> Beams:
    """Extends the beams by one token: keeps the best of those that end, and of those that go on.

    Args:
      state: the beams so far.
      logits: scores of the token after each live beam, B * beams rows.
      max_tokens, stop, length_penalty: as `beam_search` takes them.
    """
    texts, beams = state.live_sum.shape
    likelihood = jax.nn.log_softmax(logits).reshape(texts, beams, -1)
    vocabulary = likelihood.shape[-1]
    # Enough candidates that all beams go on, whichever of them end.
    count = min(beams * (1 + stop.shape[1]), beams * vocabulary)
    total = (state.live_sum[..., None] + likelihood).reshape(texts, -1)
    total, place = jax.lax.top_k(total, count)
    parent, token = place // vocabulary, (place % vocabulary).astype(jnp.int32)
    grown = jnp.take_along_axis(state.live, parent[..., None], axis=1)
    grown = grown.at[:, :, state.step].set(token)
    length = state.step + 1
    real = total > NEVER / 2
    ends = (token[..., None] == stop[:, None]).any(-1) | (length >= max_tokens)[:, None]

    scores = jnp.where(real & ends, score(total, length, length_penalty), NEVER)
    scores = jnp.concatenate([state.ended_score, scores], axis=1)
    ended_score, best = jax.lax.top_k(scores, beams)
    ended = jnp.concatenate([state.ended, grown], axis=1)
    ended_sum = jnp.concatenate([state.ended_sum, total], axis=1)
    live_sum, going = jax.lax.top_k(jnp.where(real & ~ends, total, NEVER), beams)
    rows = jnp.arange(texts)[:, None] * beams + jnp.take_along_axis(parent, going, axis=1)
    return Beams(
        read_state=state.read_state.select(rows.reshape(-1)),
        step=length,
        live=jnp.take_along_axis(grown, going[..., None], axis=1),
        live_sum=live_sum,
        ended=jnp.take_along_axis(ended, best[..., None], axis=1),
        ended_sum=jnp.take_along_axis(ended_sum, best, axis=1),
        ended_score=ended_score,
    )


def score(
    total: Float[Array, "*any"], length: Int[Array, "*some"], length_penalty: Any
) -> Float[Array, "*any"]:
    """Returns the scores that texts are compared by."""
    return total / length.astype(jnp.float32) ** length_penalty
