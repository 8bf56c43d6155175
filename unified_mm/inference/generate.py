"""Greedy generation on the cache: context and prompt are read at once, then one token a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unified_mm.modalities.tokens import PLACEMENT
from unified_mm.models.masks import Stream
from unified_mm.models.unified import UnifiedModel


def greedy(
    model: UnifiedModel,
    params: Any,
    batch: Mapping[str, Mapping[str, Array]],
    stream: Stream,
    *,
    room: int,
    most: Int[Array, " B"],
    end: int,
    padding: int,
) -> Int[Array, "B W"]:
    """The likeliest next token, again and again, until every text has ended or is full.

    Args:
      model, params: of the run.
      batch: the context modalities, and as `text` what each text starts with (`ids`, `valid`
        [B, T]: at least a begin token, then padding; documents carry their placement too).
      stream: the objective's that the model learned to write by.
      room: W, how many tokens are written at most.
      most: the same for each text.
      end, padding: ids of these tokens.

    Returns:
      What was written after the prompts, its end token included, padded.
    """
    variables = {"params": params}
    prompt = batch["text"]

    def start(module: UnifiedModel) -> Any:
        x, cache = module.prefill(batch, stream, room)
        return module.logits(last_token(x, prompt["valid"]))[:, 0], cache

    def unfinished(carry: Any) -> Array:
        step, _, _, _, done = carry
        return (step < room) & ~done.all()

    def advance(carry: Any) -> Any:
        step, written, logits, cache, done = carry
        token = jnp.where(done, padding, logits.argmax(-1).astype(written.dtype))
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], step, axis=1)
        done = done | (token == end) | (step + 1 >= most)

        def read(module: UnifiedModel) -> Any:
            x, extended = module.extend(cache, next_text(prompt, token, step), stream)
            return module.logits(x)[:, 0], extended

        logits, cache = model.apply(variables, method=read)
        return step + 1, written, logits, cache, done

    logits, cache = model.apply(variables, method=start)
    written = jnp.full((prompt["ids"].shape[0], room), padding, prompt["ids"].dtype)
    carry = (jnp.zeros((), jnp.int32), written, logits, cache, most < 1)
    return jax.lax.while_loop(unfinished, advance, carry)[1]


def last_token(
    x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> Float[Array, "B 1 D"]:
    """The embedding of the last token that is there."""
    last = jnp.maximum(valid.sum(1) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)


def next_text(
    prompt: Mapping[str, Array], token: Int[Array, " B"], step: Array
) -> dict[str, Array]:
    """The one token after a prompt and `step` tokens more, where it belongs in its document."""
    length = prompt["valid"].sum(1)
    last = jnp.maximum(length - 1, 0)[:, None]
    text = {
        "ids": token[:, None],
        "valid": jnp.ones((token.shape[0], 1), bool),
        "present": jnp.ones(token.shape[0], bool),
        "place": (length + step)[:, None],
    }
    for key in PLACEMENT:
        if key in prompt:
            text[key] = jnp.take_along_axis(prompt[key], last, axis=1)
    if "place" in prompt:
        text["place"] = jnp.take_along_axis(prompt["place"], last, axis=1) + 1 + step
    if "position" in text:
        text["position"] = text["position"] + 1 + step
    return text
