"""Keys and values in 8 bits, rows put into a cache, and a context read before its texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.models.unified import text_group
from unified_mm.nn.attention.cache import as_int8, read_slots, write_slots
from unified_mm.nn.attention.rules import View

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
PREFIX, LATEST = "prefix", "interleaved_latest"  # the widest sight of the context, the narrowest
CASES = [("early", PREFIX), ("early", LATEST), ("gated_cross_attention", LATEST),
         ("without a resampler", PREFIX), ("rotary", LATEST)]  # fmt: skip
RARER = [("gated_cross_attention", PREFIX), ("gated_cross_attention", "interleaved"),
         ("without a resampler", LATEST), ("rotary", PREFIX)]  # fmt: skip


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
    slots = old.swapaxes(1, 2)
    expected = np.array(old)
    expected[:, 3:] = new
    written = write_slots(slots, new, at)
    assert written.shape == (2, 3, 5, 4)
    np.testing.assert_array_equal(read_slots(written, jnp.float32), expected)
    small = write_slots(as_int8(slots), new, at)
    np.testing.assert_allclose(read_slots(small, jnp.float32), expected, atol=0.02)


BEGUN = np.array([2, 5, 1])  # tokens of each row that are read at once
STEPS = 7  # of one token, which the longest has room for


def decode(task, params, batch, view, *, apart=False, int8=False):
    """Ragged beginnings at once, then token by token: the scores after each, [B, 5 + 7, V].

    apart: the context is read before any text.
    """
    ids, valid, present = (batch["text"][name] for name in ("ids", "valid", "present"))
    width = int(BEGUN.max())
    begin = {"ids": ids[:, :width], "valid": valid[:, :width] & (np.arange(width) < BEGUN[:, None])}

    def run(params):
        def call(method, *args):
            return task.model.apply({"params": params}, *args, method=method)

        def one(cache, step):
            place = jnp.asarray(BEGUN)[:, None] + step
            token = {key: jnp.take_along_axis(batch["text"][key], place, 1) for key in begin}
            x, cache = call(
                "extend", cache, {**token, "present": present, "text_position": place}, view
            )
            return cache, call("logits", x)[:, 0]

        text = {**begin, "present": present}
        if apart:
            cache = call("prefix", {"image": batch["image"]}, view)
            cache = cache.in_int8() if int8 else cache
            cache_room = text_group(view, width + STEPS)
            x, cache = call("extend", cache.reserve(cache_room), text, view)
        else:
            x, cache = call("prefill", {**batch, "text": text}, view, STEPS)
            cache = cache.in_int8() if int8 else cache
        cache, later = jax.lax.scan(one, cache, jnp.arange(STEPS))
        return jnp.concatenate([call("logits", x), later.swapaxes(0, 1)], axis=1), cache

    return jax.jit(run)(params)


@pytest.mark.parametrize(
    ("name", "rule"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARER)],
)
def test_reading_on_beside_a_cache_gives_the_scores_of_one_full_pass(name, rule):
    task, params = built(name)
    batch = tiny.batch(task, 3, seed=5)  # ragged texts
    batch["image"]["present"] = batch["image"]["present"].at[1].set(False)
    view = View("captioning", rule, autoregressive=True)

    def whole(model):
        return model.logits(model.encode(batch, (view,))["captioning"].text)

    run = jax.jit(lambda params: task.model.apply({"params": params}, method=whole))
    expected, valid = np.asarray(run(params)), np.asarray(batch["text"]["valid"])
    for apart in (False, True):
        found = np.asarray(decode(task, params, batch, view, apart=apart)[0])
        for row, begun in enumerate(BEGUN):
            scores = np.concatenate([found[row, :begun], found[row, BEGUN.max() :]])
            there = valid[row, : len(scores)]
            assert there.sum() > 3
            np.testing.assert_allclose(
                scores[there], expected[row, : len(scores)][there], atol=5e-5
            )


def test_a_cache_in_eight_bits_is_smaller_and_says_nearly_the_same():
    """What the layers have read, and what they look at beside it."""
    task, params = built("gated_cross_attention")
    batch = tiny.batch(task, 3, seed=5)
    batch["text"]["valid"] = jnp.ones_like(batch["text"]["valid"])
    view = View("captioning", "prefix", autoregressive=True)
    exact, cache = decode(task, params, batch, view, apart=True)
    near, small = decode(task, params, batch, view, apart=True, int8=True)
    spread = float(jnp.std(exact))
    error = float(jnp.abs(near - exact)[:, BEGUN.max() :].mean())
    assert 0 < error < 0.02 * spread
    kept = [(c.layers, c.memory.layers) for c in (cache, small)]
    assert {x.dtype for x in jax.tree.leaves(kept[1])} == {jnp.dtype("int8"), jnp.dtype("float32")}
    size = [sum(x.nbytes for x in jax.tree.leaves(each)) for each in kept]
    width = task.model.options.head_dim
    assert size[1] == size[0] * (width + 4) // (4 * width)


def test_rows_are_put_where_they_are_wanted():
    task, params = built("gated_cross_attention")
    view = View("captioning", "prefix", autoregressive=True)
    read = jax.jit(lambda batch: task.model.apply({"params": params}, batch, view, method="prefix"))
    four, two = (read({"image": tiny.batch(task, rows, seed=rows)["image"]}) for rows in (4, 2))
    rows, others = jnp.array([3, 1]), jnp.array([0, 2])
    both = jax.jit(lambda old, new: old.put(rows, new))(four, two)
    put, left, before = (
        jax.jit(lambda cache, at=at: cache.select(at))(cache)
        for cache, at in ((both, rows), (both, others), (four, others))
    )
    jax.tree.map(np.testing.assert_array_equal, put.layers, two.layers)
    jax.tree.map(np.testing.assert_array_equal, left, before)
    jax.tree.map(np.testing.assert_array_equal, put.memory.layers, two.memory.layers)
