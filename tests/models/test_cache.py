"""Keys and values in 8 bits, rows put into a cache, and a context read before its texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.models.cache import as_int8, as_slots, read_slots, write_slots
from unified_mm.models.masks import Stream
from unified_mm.models.unified import text_group

FUSIONS = {
    "early": {},
    "gated_cross_attention": {"model__fusion": "gated_cross_attention", "model__cross__start": 0.5},
    "without a resampler": {
        "model__fusion": "gated_cross_attention",
        "model__cross__start": 0.5,
        "model__resampler__latents": 0,
    },
    "rotary": {"model__rotary_base": 100.0},
}
RULES = ("prefix", "causal", "interleaved", "interleaved_latest")


def built(name, **changes):
    task = tiny.task(objectives__matching__weight=0.0, **FUSIONS[name], **changes)
    return task, tiny.params(task)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-6, 1e6))
def test_eight_bits_are_half_a_step_away_at_most(seed, size):
    x = np.random.default_rng(seed).normal(size=(2, 3, 4, 8)).astype(np.float32) * np.float32(size)
    x[0, 0, 0] = 0
    small = as_int8(jnp.asarray(x))
    assert small.values.dtype == jnp.int8
    np.testing.assert_allclose(small.scale[..., 0], np.abs(x).max(-1) / 127, rtol=1e-6)
    back = np.asarray(read_slots(small, jnp.float32)).swapaxes(1, 2)
    assert (np.abs(back - x) <= 0.5001 * np.asarray(small.scale)).all()
    assert (back[0, 0, 0] == 0).all()


def test_what_is_written_into_slots_takes_their_form():
    old, new = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, n, 3, 4)), jnp.float32)
        for seed, n in ((0, 5), (1, 2))
    )
    at = jnp.array(3)
    slots = as_slots(old)
    expected = np.array(old)
    expected[:, 3:] = new
    written = write_slots(slots, new, at)
    assert written.shape == (2, 3, 5, 4)
    np.testing.assert_array_equal(read_slots(written, jnp.float32), expected)
    small = write_slots(as_int8(slots), new, at)
    np.testing.assert_allclose(read_slots(small, jnp.float32), expected, atol=0.02)


def decode(task, params, batch, stream, start, *, apart=False, int8=False):
    """Every text token's scores: the first `start` tokens at once, then one after the other."""
    ids, valid = batch["text"]["ids"], batch["text"]["valid"]
    rows, length = ids.shape

    def part(low, high):
        place = jnp.broadcast_to(jnp.arange(low, high), (rows, high - low))
        return {
            "ids": ids[:, low:high],
            "valid": valid[:, low:high],
            "present": jnp.ones(rows, bool),
            "place": place,
        }

    def read(model):
        begin = {key: value for key, value in part(0, start).items() if key != "place"}
        if apart:
            cache = model.prefix({"image": batch["image"]}, stream)
            cache = cache.in_int8() if int8 else cache
            x, cache = model.extend(cache.reserve(text_group(stream, length)), begin, stream)
        else:
            x, cache = model.prefill({**batch, "text": begin}, stream, length - start)
            cache = cache.in_int8() if int8 else cache
        found = [model.logits(x)]
        for step in range(start, length):
            x, cache = model.extend(cache, part(step, step + 1), stream)
            found.append(model.logits(x))
        return jnp.concatenate(found, axis=1), cache

    return jax.jit(lambda params: task.model.apply({"params": params}, method=read))(params)


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("rule", RULES)
def test_a_context_read_before_its_text_gives_the_scores_of_one_full_pass(name, rule):
    task, params = built(name)
    batch = tiny.batch(task, 3, seed=5)  # ragged texts
    batch["image"]["present"] = batch["image"]["present"].at[1].set(False)
    stream = Stream("captioning", rule, autoregressive=True)

    def whole(model):
        return model.logits(model.encode(batch, (stream,))["captioning"].text)

    run = jax.jit(lambda params: task.model.apply({"params": params}, method=whole))
    expected = np.asarray(run(params))
    there = np.asarray(batch["text"]["valid"])
    for apart in (False, True):
        found, _ = decode(task, params, batch, stream, 3, apart=apart)
        np.testing.assert_allclose(np.asarray(found)[there], expected[there], atol=5e-5)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_cache_in_eight_bits_is_smaller_and_says_nearly_the_same(name):
    task, params = built(name)
    batch = tiny.batch(task, 3, seed=5)
    batch["text"]["valid"] = jnp.ones_like(batch["text"]["valid"])
    stream = Stream("captioning", "prefix", autoregressive=True)
    exact, cache = decode(task, params, batch, stream, 2, apart=True)
    near, small = decode(task, params, batch, stream, 2, apart=True, int8=True)
    spread = float(jnp.std(exact))
    error = float(jnp.abs(near - exact)[:, 2:].mean())
    assert 0 < error < 0.02 * spread
    kept = [(c.layers, c.memory and c.memory.layers) for c in (cache, small)]
    assert {x.dtype for x in jax.tree.leaves(kept[1])} == {jnp.dtype("int8"), jnp.dtype("float32")}
    size = [sum(x.nbytes for x in jax.tree.leaves(each)) for each in kept]
    width = task.model.options.of_head
    assert size[1] == size[0] * (width + 4) // (4 * width)


@pytest.mark.parametrize("name", FUSIONS)
def test_rows_are_put_where_they_are_wanted(name):
    task, params = built(name)
    stream = Stream("captioning", "prefix", autoregressive=True)
    batches = [tiny.batch(task, rows, seed=rows) for rows in (4, 2)]
    caches = [
        task.model.apply({"params": params}, {"image": batch["image"]}, stream, method="prefix")
        for batch in batches
    ]
    rows = jnp.array([3, 1])
    both = caches[0].put(rows, caches[1])
    jax.tree.map(
        np.testing.assert_array_equal, both.select(rows).layers, caches[1].layers
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        both.select(jnp.array([0, 2])),
        caches[0].select(jnp.array([0, 2])),
    )
    if both.memory is not None:
        np.testing.assert_array_equal(
            jax.tree.leaves(both.memory.select(rows).layers)[0],
            jax.tree.leaves(caches[1].memory.layers)[0],
        )
