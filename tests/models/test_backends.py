"""Every attention backend against softmax under the whole mask, written out in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.modalities.tokens import Group, TokenMetadata, single_document
from unified_mm.models import backends, chunked
from unified_mm.models.backends import look
from unified_mm.models.masks import RULES, Stream, Visibility, block_calls, reference_mask
from unified_mm.models.options import TransformerOptions
from unified_mm.models.resampler import look_at_all
from unified_mm.models.sight import pick
from unified_mm.models.unified import text_group

WIDTH = 4  # of a head
GROUPS = (
    Group("image", "image", 7),
    Group("sound", "sound", 3),
    Group("t", "text", 9),
    Group("u", "text", 5),
)
# float32 against float64; gradients add up more terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_GRADIENTS = {"rtol": 1e-4, "atol": 2e-5}
# Blocks of a few queries, whatever the length.
ATTEND = {"xla": backends.attend, "chunked": partial(chunked.attend, scores=60)}


def options(name, heads=4, key_value_heads=2, width=WIDTH, **more):
    return TransformerOptions(
        heads * width, 1, heads, 8, key_value_heads=key_value_heads, attention=name, **more
    )


def filled(groups, seed, documents=2):
    """Metadata of any kind: order, segments, documents and holes at random."""
    rng = np.random.default_rng(seed)
    shape = (2, sum(group.length for group in groups))
    return TokenMetadata(
        position=jnp.asarray(rng.integers(0, 12, shape), jnp.int32),
        segment=jnp.asarray(rng.integers(0, 3, shape), jnp.int32),
        document=jnp.asarray(rng.integers(0, documents, shape), jnp.int32),
        valid=jnp.asarray(rng.random(shape) < 0.7),
        groups=tuple(groups),
    )


def heads_of(queries, keys, seed, heads=4, key_value_heads=2, width=WIDTH):
    """Queries, keys, values, and what is backpropagated."""
    rng = np.random.default_rng(seed)
    rows, columns = queries.valid.shape[1], keys.valid.shape[1]
    sizes = [(rows, heads), (columns, key_value_heads), (columns, key_value_heads), (rows, heads)]
    shape = [(queries.valid.shape[0], length, count, width) for length, count in sizes]
    return [rng.normal(size=each).astype(np.float32) for each in shape]


def written_out(query, key, value, cotangent, mask):
    """Attention and its gradients by formula; a query that sees nothing gives zero."""
    query, key, value, cotangent = (np.float64(x) for x in (query, key, value, cotangent))
    shared = query.shape[2] // key.shape[2]
    wide = [np.repeat(x, shared, axis=2) for x in (key, value)]
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("bqha,bkha->bhqk", query, wide[0]) * scale
    weights = np.where(mask[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    by_weight = np.einsum("bqha,bkha->bhqk", cotangent, wide[1])
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True)) * scale

    def narrow(x):
        return x.reshape(*x.shape[:2], -1, shared, x.shape[-1]).sum(3)

    return np.einsum("bhqk,bkha->bqha", weights, wide[1]), (
        np.einsum("bhqk,bkha->bqha", by_score, wide[0]),
        narrow(np.einsum("bhqk,bqha->bkha", by_score, query)),
        narrow(np.einsum("bhqk,bqha->bkha", weights, cotangent)),
    )


def by_calls(name, visibility, queries, keys, attend=None):
    """query, key, value -> what all block calls of a rule give, side by side."""
    attend = attend or ATTEND[name]

    def run(query, key, value):
        parts = []
        for call in block_calls(visibility, queries.groups, keys.groups):
            rows = query[:, slice(*call.queries)]
            if not call.keys:
                parts.append(jnp.zeros_like(rows))
                continue
            chosen = options(name, query.shape[2], key.shape[2], query.shape[3])
            sight = look(chosen, call, queries, keys)
            parts.append(attend(rows, pick(key, call), pick(value, call), sight))
        return jnp.concatenate(parts, axis=1)

    return run


def agree(run, arrays, mask):
    """Values and gradients of `run` are those written out."""
    *inputs, cotangent = arrays
    expected, expected_gradients = written_out(*arrays, np.asarray(mask))

    @jax.jit
    def both(inputs, cotangent):
        found, pull = jax.vjp(run, *inputs)
        return found, pull(cotangent)

    found, gradients = both(inputs, cotangent)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert (np.asarray(found)[~np.asarray(mask).any(-1)] == 0).all()
    for each, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(each, other, **CLOSE_GRADIENTS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ATTEND)
def test_one_sequence_under_every_rule(name, rule):
    visibility = Visibility((Stream("t", rule), Stream("u", rule)))
    metadata = filled(GROUPS, seed=1)
    metadata = metadata.replace(document=metadata.document.at[0, 2].set(7))  # sees itself at most
    metadata = metadata.replace(valid=metadata.valid.at[0, 2].set(False))
    mask = reference_mask(visibility, metadata, metadata)
    assert not np.asarray(mask)[0, 2].any()
    run = by_calls(name, visibility, metadata, metadata)
    agree(run, heads_of(metadata, metadata, 2), mask)


@pytest.mark.parametrize("rule", ["separate", "prefix", "interleaved", "interleaved_latest"])
@pytest.mark.parametrize("name", ATTEND)
def test_text_that_looks_at_a_memory(name, rule):
    """Cross-attention: texts look at features of a sequence of their own, under rules of theirs."""
    visibility = Visibility((Stream("t", rule), Stream("u", "separate")))
    queries, keys = filled(GROUPS[2:], seed=3), filled(GROUPS[:2], seed=4)
    mask = reference_mask(visibility, queries, keys)
    assert not np.asarray(mask)[:, 9:].any()
    agree(by_calls(name, visibility, queries, keys), heads_of(queries, keys, 5), mask)


@pytest.mark.parametrize("name", ATTEND)
def test_latents_that_look_at_what_is_there(name):
    """The resampler's: features with holes, and all latents."""
    latents, features = 5, 14
    valid = jnp.asarray(np.random.default_rng(6).random((2, features)) < 0.5).at[1].set(False)
    sight = look_at_all(options(name, 2, 2), valid, latents)
    mask = np.pad(np.asarray(valid), ((0, 0), (0, latents)), constant_values=True)
    mask = np.broadcast_to(mask[:, None], (2, latents, features + latents))
    queries, keys = filled([Group("l", "l", latents)], 0), filled([Group("k", "k", 19)], 0)
    arrays = heads_of(queries, keys, 7, 2, 2)
    agree(lambda q, k, v: ATTEND[name](q, k, v, sight), arrays, mask)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (2, 1), (6, 3), (4, 1)]),
    st.integers(1, 500),
    st.sampled_from(["all", "causal", "same_segment", "block_causal"]),
    st.integers(0, 2**31),
)
def test_blocks_of_any_size(rows, columns, heads, scores, predicate, seed):
    """Lengths that blocks do not divide, one query a block, one block for all."""
    rule = {"all": "joint", "causal": "causal", "same_segment": "interleaved_latest"}
    queries = filled([Group("t", "text", rows)], seed)
    keys = filled([Group("image", "image", columns)], seed + 1)
    visibility = Visibility((Stream("t", rule.get(predicate, "interleaved")),))
    run = by_calls("chunked", visibility, queries, keys, partial(chunked.attend, scores=scores))
    mask = reference_mask(visibility, queries, keys)
    agree(run, heads_of(queries, keys, seed, *heads), mask)
    blocks = chunked.block_count(rows, columns, scores)
    assert 1 <= blocks <= rows and (blocks == 1) == (scores >= rows * columns or rows == 1)


def compiled_gradient(name, length, rule="prefix"):
    """The program of attention's values and gradients over one sequence, not run."""
    groups = (Group("image", "image", length // 4), Group("t", "text", length - length // 4))
    metadata = single_document(jnp.ones((1, length), bool), Group("all", "text", length))
    metadata = jax.eval_shape(lambda: metadata.replace(groups=groups))

    def total(arrays, metadata):
        visibility = Visibility((Stream("t", rule),))
        return by_calls(name, visibility, metadata, metadata, backends.attend)(*arrays).sum()

    arrays = [jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)] * 3
    return jax.jit(jax.value_and_grad(total)).lower(arrays, metadata).compile()


def test_blocks_hold_less_than_a_tenth_of_xlas_memory():
    programs = {name: compiled_gradient(name, 4096) for name in ATTEND}
    sizes = {name: each.memory_analysis().temp_size_in_bytes for name, each in programs.items()}
    assert sizes["chunked"] < 0.1 * sizes["xla"], sizes
    text = programs["chunked"].as_text()
    assert "3072,4096" in programs["xla"].as_text() and "3072,4096" not in text
    # And it grows with the length, not with its square.
    shorter = compiled_gradient("chunked", 2048).memory_analysis().temp_size_in_bytes
    assert sizes["chunked"] < 2.5 * shorter


FUSIONS = {
    "early": {},
    "gated_cross_attention": {
        "objectives__matching__weight": 0.0,
        "model__resampler__latents": 3,
        "model__resampler__layers": 1,
        "model__resampler__heads": 2,
        "model__resampler__head_width": 4,
        "model__resampler__feed_forward": 8,
    },
    "late": {"objectives__matching__weight": 0.0, "objectives__captioning__weight": 0.0},
}


@pytest.mark.parametrize(
    "fusion",
    [
        pytest.param("early", marks=pytest.mark.slow),
        "gated_cross_attention",
        pytest.param("late", marks=pytest.mark.slow),
    ],
)
def test_a_whole_model_is_the_same_in_blocks(fusion, monkeypatch):
    """Loss and gradients of all objectives, with absent pictures and ragged texts."""
    monkeypatch.setattr(chunked, "SCORES", 20)

    def measured(name):
        changes = {**FUSIONS[fusion], "model__fusion": fusion, "model__attention": name}
        task = tiny.task(**changes)
        batch = tiny.batch(task)
        batch["image"]["present"] = jnp.array([True, False, True, True])

        def total(params):
            pairs = task.pairs(params, batch, jax.random.key(3), deterministic=True)
            return sum(pairs[f"{o.name}/loss"][0] for o in task.objectives)

        return jax.jit(jax.value_and_grad(total))(tiny.params(task))

    (value, gradient), (other, other_gradient) = measured("xla"), measured("chunked")
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("fusion", ["early", "gated_cross_attention"])
def test_reading_on_beside_a_cache_in_blocks(fusion, monkeypatch):
    """A text read in two parts, the second beside the cache, is the text read at once."""
    monkeypatch.setattr(chunked, "SCORES", 20)
    changes = {**FUSIONS[fusion], "model__fusion": fusion, "model__attention": "chunked"}
    task = tiny.task(**changes)
    params, batch = tiny.params(task), tiny.batch(task, 2)
    stream = Stream("captioning", "prefix", autoregressive=True)
    text = {key: batch["text"][key] for key in ("ids", "valid", "present")}
    text["valid"] = jnp.ones_like(text["valid"])

    def part(start, stop):
        cut = {key: text[key][:, start:stop] for key in ("ids", "valid")}
        place = jnp.broadcast_to(jnp.arange(start, stop), cut["ids"].shape)
        return {**cut, "present": text["present"], "place": place}

    def run(model):
        whole = model.encode({**batch, "text": text}, (stream,))["captioning"].text
        first, cache = model.prefill({**batch, "text": part(0, 5)}, stream, 7)
        assert text_group(stream, 12) == cache.metadata.groups[-1]
        second, _ = model.extend(cache, part(5, 12), stream)
        return whole, jnp.concatenate([first, second], axis=1)

    whole, parts = jax.jit(lambda p: task.model.apply({"params": p}, method=run))(params)
    np.testing.assert_allclose(whole, parts, atol=2e-5)
