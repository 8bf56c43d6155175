"""Cost of each way to generate text, and its effect on quality: `bench --inference`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from unified_mm.benchmarks.timing import (
    allocated_bytes,
    fused_attention,
    held_bytes,
    percentiles,
    times_of,
    tree_bytes,
)
from unified_mm.data.records import Record
from unified_mm.evaluation.caption_scores import caption_scores
from unified_mm.evaluation.evaluate import captions_of
from unified_mm.inference.decoding import GREEDY, Written
from unified_mm.inference.generate import TextWriter
from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.predictor import Predictor, inputs_of, write_texts
from unified_mm.inference.quantization import quantized
from unified_mm.models.unified import UnifiedModel

NEVER = -1  # no token ends a text that is timed
QUALITY_BATCH = 50


@dataclass(frozen=True)
class Way:
    """One way to generate text.

    Attributes:
      name: its name in the table.
      model: the model that writes.
      cached: whether keys and values of earlier tokens are cached.
    """

    name: str
    model: LoadedModel
    cached: bool


def ways(model: LoadedModel) -> Iterator[Way]:
    """Yields the ways to generate text, from the plainest to all optimizations together.

    Each is made only when it is asked for.
    """
    fused = fused_attention()
    plain = model.with_options(dtype=jnp.float32, attention="xla", cache="same")
    half = plain.with_options(dtype=jnp.bfloat16)
    yield Way("baseline", plain, False)
    yield Way("bfloat16", half, False)
    yield Way("cache, float32", plain, True)
    yield Way("cache", half, True)
    yield Way(f"+ {fused}", half.with_options(attention=fused), True)
    small = quantized(model.with_options(attention="auto")).with_options(dtype=jnp.bfloat16)
    yield Way("+ int8 weights", small, True)
    yield Way("+ int8 cache", half.with_options(cache="int8", attention="auto"), True)
    yield Way("all", small.with_options(cache="int8"), True)


def recompute(
    writer: TextWriter, params: Any, inputs: Mapping[str, Any]
) -> tuple[Int[Array, "B S"], Array]:
    """Decodes greedily without a cache: context and text are read anew for each token.

    Takes and returns the same as `write_texts`.
    """
    model, view, cache_room = writer.model, writer.view, writer.cache_room
    batch, max_tokens, stop = (inputs[name] for name in ("batch", "max_tokens", "stop"))
    prompt = batch["text"]
    rows, width = prompt["ids"].shape
    begun = prompt["valid"].sum(1)
    places = jnp.arange(width + cache_room)
    ids = jnp.pad(prompt["ids"], ((0, 0), (0, cache_room)))

    def read(module: UnifiedModel, ids: Array, count: Array) -> Array:
        text = {
            "ids": ids,
            "valid": places < (begun + count)[:, None],
            "present": jnp.ones(rows, bool),
        }
        x = module.encode({**batch, "text": text}, (view,))[view.name].text
        last = (begun + count - 1)[:, None, None]
        return module.logits(jnp.take_along_axis(x, last, axis=1))[:, 0]

    def decode_step(carry: Any) -> Any:
        ids, count, done, gained = carry
        logits: Any = model.apply({"params": params}, ids, count, method=read)
        token = jnp.where(done, writer.padding, logits.argmax(-1)).astype(ids.dtype)
        at = jnp.where(done, width + cache_room, begun + count)
        likelihood = jax.nn.log_softmax(logits).max(-1)
        ended = (token[:, None] == stop).any(1) | (count + 1 >= max_tokens)
        return (
            ids.at[jnp.arange(rows), at].set(token, mode="drop"),
            count + (~done).astype(jnp.int32),
            done | ended,
            gained + jnp.where(done, 0, likelihood),
        )

    start = ids, jnp.zeros(rows, jnp.int32), max_tokens < 1, jnp.zeros(rows, jnp.float32)
    ids, _, _, gained = jax.lax.while_loop(lambda carry: ~carry[2].all(), decode_step, start)
    written = jnp.take_along_axis(ids, begun[:, None] + jnp.arange(cache_room), axis=1, mode="fill")
    return written, gained


def write_function(way: Way, cache_room: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Returns a way's function to compile: (params, inputs) -> tokens and their log-likelihood."""
    writer = way.model.predictor.writer(cache_room)

    def write(params: Any, inputs: Any) -> Any:
        if way.cached:
            return write_texts(writer, params, inputs, beams=1, samples=1)
        return recompute(writer, params, inputs)

    return write


def generation_table(
    model: LoadedModel,
    records: Sequence[Record],
    *,
    tokens: int,
    batches: Sequence[int],
    repeats: int,
    bandwidth: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measures every way to generate text at every batch size.

    Args:
      model: the model to measure.
      records: images whose captions are scored, the same for every way.
      tokens: length of each timed text; no token ends it earlier.
      batches: batch sizes.
      repeats: number of timed runs for each row.
      bandwidth: memory bandwidth of the device in bytes a second, which bounds cached decoding.
      say: called with a line for each row.

    Returns:
      A row for each way and batch size.
    """
    rows: list[dict[str, Any]] = []
    for way in ways(model):
        quality = caption_quality(way, records)
        for batch in batches:
            row = {"name": way.name, "batch": batch, **costs(way, batch, tokens, repeats)}
            if way.cached:
                floor = row["decode_step_reads_bytes"] / bandwidth
                row["floor_tokens_per_second"] = round(batch / floor, 1)
            rows.append({**row, "cider_d": round(quality, 4)})
            say(
                "{name:<16} batch {batch:>4} {tokens_per_second:>11.1f} tokens/s  p50 "
                "{p50_ms:>9.2f} ms  {peak_bytes:>13,} B  CIDEr-D {cider_d:.3f}".format(**rows[-1])
            )
    return rows


def costs(way: Way, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Measures speed, latency and memory of writing `tokens` tokens for each of `batch` images."""
    longer = lengthened(way.model, tokens + 1)
    timed = replace(way, model=longer)
    predictor = longer.predictor
    inputs = predictor.to_device(_inputs(predictor, batch, tokens))
    with predictor.on_mesh():
        compiled = jax.jit(write_function(timed, tokens)).lower(predictor.params, inputs).compile()
        compiled(predictor.params, inputs)
        seconds = times_of(lambda: compiled(predictor.params, inputs), repeats)
        found = {
            "tokens_per_second": round(batch * tokens / float(np.median(seconds)), 2),
            **percentiles(seconds),
            "peak_bytes": held_bytes(compiled),
            "weight_bytes": tree_bytes(way.model.predictor.params),
            **allocated_bytes(),
        }
        return found | (step_bytes(timed, inputs, tokens) if way.cached else {})


def step_bytes(way: Way, inputs: Any, tokens: int) -> dict[str, int]:
    """Returns the bytes that one compiled decoding step holds, and those that it has to read."""
    cached = way.model.predictor.writer(tokens)
    state = jax.eval_shape(cached.begin, way.model.predictor.params, inputs)
    step = jax.jit(cached.decode_step, donate_argnums=1)
    held = held_bytes(step.lower(way.model.predictor.params, state).compile())
    cache = tree_bytes(state.read_state.cache)
    read = tree_bytes(text_side(way.model.predictor.params)) + cache
    return {"decode_step_bytes": held, "cache_bytes": cache, "decode_step_reads_bytes": read}


def text_side(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters that are read for every generated token.

    The embedders, towers and resamplers of context modalities are not among them; the token
    table is, because it scores the next token.
    """
    return {name: params[name] for name in ("transformer", "embedders_text")}


def caption_quality(way: Way, records: Sequence[Record]) -> float:
    """Returns the CIDEr-D of the captions that a way writes, up to the model's own length."""
    predictor = way.model.predictor
    cache_room = way.model.task.modalities["text"].length - 1
    tokenizer = way.model.task.tokenizer
    compiled = jax.jit(write_function(way, cache_room))
    captions: list[str] = []
    views = [way.model.view(record.image) for record in records]
    for first in range(0, len(views), QUALITY_BATCH):
        part = views[first : first + QUALITY_BATCH]
        full = part + part[:1] * (QUALITY_BATCH - len(part))
        inputs = _inputs(predictor, QUALITY_BATCH, cache_room, np.stack(full), tokenizer.eos_id)
        with predictor.on_mesh():
            written, _ = jax.device_get(
                compiled(way.model.predictor.params, predictor.to_device(inputs))
            )
        captions += [
            Written.of_row(row, 0.0, (tokenizer.eos_id,), tokenizer).text
            for row in written[: len(part)]
        ]
    return float(caption_scores(captions, [captions_of(record) for record in records])["cider_d"])


def _inputs(
    predictor: Predictor, batch: int, cache_room: int, views: Any = None, end: int = NEVER
) -> dict[str, Any]:
    """Returns the inputs for captioning `batch` images, grey ones where none are given."""
    arrays = predictor.task.example_batch(batch)
    del arrays["text"]
    if views is None:
        views = np.full(arrays["image"]["pixels"].shape, 128, np.uint8)
    arrays["image"] = {"pixels": views, "present": np.ones(batch, bool)}
    text, _ = predictor.prompts([""] * batch)
    max_tokens = np.full(batch, cache_room)
    return inputs_of(GREEDY, {**arrays, "text": text}, max_tokens, (end,), 0)


def lengthened(model: LoadedModel, length: int) -> LoadedModel:
    """Returns the same model with room for texts of `length` tokens, for timing alone.

    Learned positions beyond the model's own are repeated, so what it writes there means nothing.
    """
    text = model.task.modalities["text"]
    if text.length >= length:
        return model
    embedding = replace(text.embedding, max_positions=max(text.embedding.max_positions, length))
    modalities = dict(model.task.modalities)
    modalities["text"] = replace(text, length=length, embedding=embedding)
    unified = model.task.model.clone(modalities=modalities)
    params = dict(model.params)
    if text.embedding.learned_positions:
        embedder = dict(params["embedders_text"])
        positions = embedder["positions"]
        embedder["positions"] = jnp.resize(positions, (embedding.max_positions, positions.shape[1]))
        params["embedders_text"] = embedder
    task = replace(model.task, modalities=modalities, model=unified)
    return LoadedModel(task, params, model.predictor.mesh, model.config, model.step)
