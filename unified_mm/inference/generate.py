"""Greedy generation on the cache: the context is read once, then one token a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from unified_mm.models.attention import Cache
from unified_mm.models.masks import Stream
from unified_mm.models.unified import UnifiedModel, text_group


def greedy(
    model: UnifiedModel,
    params: Any,
    batch: Mapping[str, Mapping[str, Array]],
    prompt: Int[Array, "B T"],
    prompt_length: Int[Array, " B"],
    stream: Stream,
    *,
    end: int,
    padding: int,
) -> Int[Array, "B T"]:
    """The likeliest next token, again and again, until every text has ended or is full.

    Args:
      model, params: of the run.
      batch: the context modalities.
      prompt: token ids that each text starts with (at least the begin token), padded.
      prompt_length: how many of them there are.
      stream: the objective's that the model learned to write by.
      end, padding: ids of these tokens.

    Returns:
      The whole texts, prompt included, padded after their end.
    """
    rows, length = prompt.shape
    variables = {"params": params}
    cache: Cache = model.apply(variables, batch, stream, method="read_context")[1]  # type: ignore[assignment]
    cache = cache.reserve(text_group(stream, length))

    def unfinished(carry: Any) -> Array:
        step, _, _, done = carry
        return (step < length - 1) & ~done.all()

    def advance(carry: Any) -> Any:
        step, ids, cache, done = carry
        token = jax.lax.dynamic_slice_in_dim(ids, step, 1, axis=1)
        text = {
            "ids": token,
            "valid": jnp.ones((rows, 1), bool),
            "present": jnp.ones(rows, bool),
        }

        def read(module: UnifiedModel) -> Any:
            x, extended = module.extend(cache, text, stream, start=step)
            return module.logits(x)[:, 0], extended

        logits, cache = model.apply(variables, method=read)
        prompted = step + 1 < prompt_length
        chosen = jnp.where(done, padding, logits.argmax(-1).astype(ids.dtype))
        given = jax.lax.dynamic_slice_in_dim(prompt, step + 1, 1, axis=1)[:, 0]
        token = jnp.where(prompted, given, chosen)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], step + 1, axis=1)
        return step + 1, ids, cache, done | (~prompted & (token == end))

    start = jnp.where(jnp.arange(length) == 0, prompt, padding)
    carry = (jnp.zeros((), jnp.int32), start, cache, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, advance, carry)[1]
