"""Every attention backend against softmax under the whole mask, written out in float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attending import WIDTH, agree, attended, heads_of, on
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.config import Config
from unified_mm.inference.predictor import Predictor
from unified_mm.models.unified import text_group
from unified_mm.nn.attention import chunked, cudnn, masks, splash
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.masks import block_mask, cut, reference_mask, static_mask
from unified_mm.nn.attention.rules import RULES, MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.resampler import plan_latents
from unified_mm.nn.tokens import (
    Group,
    TokenMetadata,
    join_metadata,
    lengthen,
    offset_positions,
    single_document,
    take,
    unfold_items,
    with_positions,
)
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import rule_items
from unified_mm.training.ahead import abstract_phases
from unified_mm.training.layout import attention_line, chosen

GROUPS = (
    Group("image", "image", 7),
    Group("sound", "sound", 3),
    Group("t", "text", 9),
    Group("u", "text", 5),
)
# Blocks of a few queries, whatever the length.
ATTEND = {"xla": masks.attend, "chunked": partial(chunked.attend, scores=60)}


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


def by_calls(name, table, queries, keys, attend=None):
    """query, key, value -> what all block calls of a rule give, side by side."""

    def run(query, key, value):
        chosen = options(name, query.shape[2], key.shape[2], query.shape[3])
        plan = plan_attention(chosen, table, queries, keys)
        return attended(plan, attend or ATTEND[name], query, key, value)

    return run


def backend_of(asked, platform, rule="prefix", query="t", metadata=None, **lengths):
    """The backend that computes what one group sees."""
    metadata = metadata or in_order(lengths or {"image": 128, "t": 128})
    table = MaskTable((View("t", rule),))
    with on(platform):
        plan = plan_attention(asked, table, take(metadata, [query]), metadata)
    (seen_by,) = plan.masks
    return seen_by.backend


def outsiders_in_words(rule, metadata):
    """Mask and bias [B, Q, K] of `toy_rules`, token by token."""
    owner = [group for group in metadata.groups for _ in range(group.length)]
    fields = ("position", "document", "valid")
    position, document, valid = (np.asarray(getattr(metadata, name)) for name in fields)
    mask = np.zeros((2, len(owner), len(owner)), bool)
    bias = np.zeros(mask.shape)
    for b, q, k in np.ndindex(*mask.shape):
        query, key = owner[q], owner[k]
        far = abs(int(position[b, q]) - int(position[b, k]))
        text, other = query.modality == "text", key.modality == "text"
        if rule == "windowed":
            seen = far < (3 if text and not other else 2)
        else:
            seen = position[b, k] <= position[b, q] if other else True
            bias[b, q, k] = -0.5 * far if text else 0.0
        allowed = key.name == query.name if other or not text else True
        mask[b, q, k] = seen and allowed and valid[b, k] and document[b, q] == document[b, k]
    return mask, bias


@pytest.mark.parametrize("rule", ["windowed", "faded"])
@pytest.mark.parametrize("name", ATTEND)
def test_predicates_and_score_terms_from_outside(name, rule):
    views = tuple(View(each, f"toy_rules:{rule.upper()}") for each in ("t", "u"))
    metadata = filled(GROUPS, seed=1)
    mask, bias = outsiders_in_words(rule, metadata)
    run = by_calls(name, MaskTable(views), metadata, metadata)
    agree(run, heads_of(metadata, metadata, 2), mask, bias[:, None])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("WINDOWED", "does not know the predicate Window.size=3.: set model.attention='auto'"),
        ("FADED", "adds nothing to scores, and a rule adds Fading.slope=0.5.: set"),
    ],
)
def test_kernels_refuse_what_they_do_not_know(monkeypatch, rule, message):
    monkeypatch.setattr(cudnn, "widest_head", lambda: 128)
    metadata = in_order({"image": 128, "t": 128})
    rule = f"toy_rules:{rule}"
    for name, platform, dtype in (("cudnn", "gpu", "bfloat16"), ("splash", "tpu", "float32")):
        asked = options(name, width=64, dtype=jnp.dtype(dtype))
        with pytest.raises(ValueError, match=message):
            backend_of(asked, platform, rule, metadata=metadata)
        auto = options("auto", width=64, dtype=jnp.dtype(dtype))
        assert backend_of(auto, platform, rule, metadata=metadata) in ("xla", "chunked")
        # What the package brings is known to both.
        assert backend_of(auto, platform, metadata=metadata) == name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ATTEND)
def test_one_sequence_under_every_rule(name, rule):
    table = MaskTable((View("t", rule), View("u", rule)))
    metadata = filled(GROUPS, seed=1)
    metadata = metadata.replace(document=metadata.document.at[0, 2].set(7))  # sees itself at most
    metadata = metadata.replace(valid=metadata.valid.at[0, 2].set(False))
    mask = reference_mask(table, metadata, metadata)
    assert not np.asarray(mask)[0, 2].any()
    run = by_calls(name, table, metadata, metadata)
    agree(run, heads_of(metadata, metadata, 2), mask)


@pytest.mark.parametrize("rule", ["separate", "prefix", "interleaved", "interleaved_latest"])
@pytest.mark.parametrize("name", ATTEND)
def test_text_that_looks_at_a_memory(name, rule):
    """Cross-attention: texts look at features of a sequence of their own, under rules of theirs."""
    table = MaskTable((View("t", rule), View("u", "separate")))
    queries, keys = filled(GROUPS[2:], seed=3), filled(GROUPS[:2], seed=4)
    mask = reference_mask(table, queries, keys)
    assert not np.asarray(mask)[:, 9:].any()
    agree(by_calls(name, table, queries, keys), heads_of(queries, keys, 5), mask)


@pytest.mark.parametrize("name", ATTEND)
def test_latents_that_look_at_what_is_there(name):
    """The resampler's: features with holes, and all latents."""
    latents, features = 5, 14
    valid = jnp.asarray(np.random.default_rng(6).random((2, features)) < 0.5).at[1].set(False)
    plan = plan_latents(options(name, 2, 2), valid, latents)
    mask = np.pad(np.asarray(valid), ((0, 0), (0, latents)), constant_values=True)
    mask = np.broadcast_to(mask[:, None], (2, latents, features + latents))
    queries, keys = filled([Group("l", "l", latents)], 0), filled([Group("k", "k", 19)], 0)
    arrays = heads_of(queries, keys, 7, 2, 2)
    agree(partial(attended, plan, ATTEND[name]), arrays, mask)


@settings(max_examples=6, deadline=None)
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
    table = MaskTable((View("t", rule.get(predicate, "interleaved")),))
    run = by_calls("chunked", table, queries, keys, partial(chunked.attend, scores=scores))
    mask = reference_mask(table, queries, keys)
    agree(run, heads_of(queries, keys, seed, *heads), mask)
    blocks = chunked.block_count(rows, columns, scores)
    assert 1 <= blocks <= rows and (blocks == 1) == (scores >= rows * columns or rows == 1)


def compiled_gradient(name, length, rule="prefix"):
    """The program of attention's values and gradients over one sequence, not run."""
    groups = (Group("image", "image", length // 4), Group("t", "text", length - length // 4))
    metadata = single_document(jnp.ones((1, length), bool), Group("all", "text", length))
    metadata = jax.eval_shape(lambda: metadata.replace(groups=groups))

    def total(arrays, metadata):
        table = MaskTable((View("t", rule),))
        attend = {"xla": masks.attend, "chunked": chunked.attend}[name]
        return by_calls(name, table, metadata, metadata, attend)(*arrays).sum()

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
}


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_whole_model_is_the_same_in_blocks(fusion, monkeypatch):
    """Loss and gradients of all objectives, with absent pictures and ragged texts."""
    monkeypatch.setattr(chunked, "SCORES", 20)

    def measured(name):
        changes = {**FUSIONS[fusion], "model__fusion": fusion, "model__attention": name}
        task = tiny.task(**changes)
        batch = tiny.batch(task)
        batch["image"]["present"] = jnp.array([True, False, True, True])

        def total(params):
            metrics = task.metrics(params, batch, jax.random.key(3), deterministic=True)
            return sum(metrics[f"{o.name}/loss"][0] for o in task.objectives)

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
    view = View("captioning", "prefix", autoregressive=True)
    text = {key: batch["text"][key] for key in ("ids", "valid", "present")}
    text["valid"] = jnp.ones_like(text["valid"])

    def part(start, stop):
        cut = {key: text[key][:, start:stop] for key in ("ids", "valid")}
        place = jnp.broadcast_to(jnp.arange(start, stop), cut["ids"].shape)
        return {**cut, "present": text["present"], "text_position": place}

    def run(model):
        whole = model.encode({**batch, "text": text}, (view,))["captioning"].text
        first, cache = model.prefill({**batch, "text": part(0, 5)}, view, 7)
        begins = model.text_begins(cache, view)
        assert text_group(view, 12, begins) == cache.metadata.groups[-1] and begins
        second, _ = model.extend(cache, part(5, 12), view)
        return whole, jnp.concatenate([first, second], axis=1)

    whole, parts = jax.jit(lambda p: task.model.apply({"params": p}, method=run))(params)
    np.testing.assert_allclose(whole, parts, atol=2e-5)


def in_order(lengths, batch=2, seed=0):
    """Context and text in order, as a batch without placement has them, with holes."""
    rng = np.random.default_rng(seed)
    parts, before = [], 0
    for name, length in lengths.items():
        valid = jnp.asarray(rng.random((batch, length)) < 0.7)
        modality = "text" if len(name) == 1 else name
        part = single_document(valid, Group(name, modality, length))
        parts.append(offset_positions(part, {}, before))
        before += length
    return join_metadata(parts)


@pytest.mark.parametrize(
    "rule",
    ["prefix", "joint", pytest.param("interleaved", marks=pytest.mark.slow)],
)
def test_splash_as_a_tpu_would_run_it(rule):
    """Its program interpreted on a CPU: 256 tokens of text, 4 heads on 2, holes, blind rows."""
    metadata = in_order({"image": 128, "t": 256})
    metadata = metadata.replace(valid=metadata.valid.at[0, :140].set(False))
    table = MaskTable((View("t", rule),))
    mask = reference_mask(table, metadata, metadata)
    assert not np.asarray(mask)[0].any(-1).all() or rule == "joint"
    run = by_calls("splash", table, metadata, metadata, partial(splash.attend, interpret=True))
    with on("tpu"):
        agree(run, heads_of(metadata, metadata, 8, 4, 2, 64), mask)


def test_splash_of_lengths_that_it_pads():
    """A photograph's patches and a text: neither is a multiple of what the kernel takes."""
    metadata = in_order({"image": 196, "t": 64})
    metadata = metadata.replace(valid=metadata.valid.at[0, :196].set(False))
    table = MaskTable((View("t", "prefix"),))
    run = by_calls("splash", table, metadata, metadata, partial(splash.attend, interpret=True))
    with on("tpu"):
        arrays = heads_of(metadata, metadata, 8, 2, 1, 64)
        agree(run, arrays, reference_mask(table, metadata, metadata))


def test_splash_of_a_whole_pass_is_one_call():
    """A picture, a caption that reads it and a text that does not, with holes: one kernel."""
    metadata = in_order({"image": 40, "t": 24, "u": 16})
    metadata = metadata.replace(valid=metadata.valid.at[0, :42].set(False).at[1, 70:].set(False))
    table = MaskTable((View("t", "prefix_separate"), View("u", "separate_causal")))
    mask = reference_mask(table, metadata, metadata)
    run = by_calls("splash", table, metadata, metadata, partial(splash.attend, interpret=True))
    with on("tpu"):
        arrays = heads_of(metadata, metadata, 8, 2, 1, 64)
        agree(run, arrays, mask)
        assert str(jax.make_jaxpr(run)(*arrays[:3])).count("pallas_call[") == 1
        asked = options("splash", width=64)
        some = plan_attention(asked, table, take(metadata, ["t", "u"]), metadata)
        assert len(some.at_once.joined) == 2
        auto = options("auto", width=64)
        short = in_order({"image": 40, "t": 24, "u": 15})  # too few for the kernel
        assert plan_attention(auto, table, short, short).at_once is None
        # Two blocks of 512 queries become nine of 128 where the text's 64 are added.
        long = in_order({"image": 1024, "t": 64, "u": 64})
        assert plan_attention(asked, table, long, long).at_once is None
    assert plan_attention(auto, table, metadata, metadata).at_once is None


def test_splash_in_packed_documents_that_see_all():
    metadata = filled([Group("image", "image", 128), Group("t", "text", 128)], seed=2, documents=3)
    table = MaskTable((View("t", "joint"),))
    run = by_calls("splash", table, metadata, metadata, partial(splash.attend, interpret=True))
    mask = reference_mask(table, metadata, metadata)
    with on("tpu"):
        agree(run, heads_of(metadata, metadata, 9, 2, 2, 64), mask)


def test_splash_on_a_mesh_divides_examples_and_heads():
    metadata = in_order({"image": 128, "t": 128})
    table = MaskTable((View("t", "prefix"),))
    with on("tpu"):
        plan = plan_attention(options("splash", 4, 2, 64), table, metadata, metadata)
    run = partial(attended, plan, partial(splash.attend, interpret=True))
    arrays = heads_of(metadata, metadata, 10, 4, 2, 64)[:3]
    alone = jax.jit(run)(*arrays)
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
        divided = jax.jit(lambda *arrays: run(*arrays))(*arrays)
    np.testing.assert_allclose(divided, alone, atol=1e-6)
    assert {shard.data.shape for shard in divided.addressable_shards} == {(1, 256, 2, 64)}


def test_what_splash_cannot_do_it_refuses():
    wide = options("splash", width=64)

    def why(asked=wide, platform="tpu", *what, **more):
        with pytest.raises(ValueError, match="model.attention='splash'") as caught:
            backend_of(asked, platform, *what, **more)
        return str(caught.value)

    assert backend_of(wide, "tpu") == "splash"
    assert "needs a TPU, and this runs on cpu: set model.attention='auto'" in why(platform="cpu")
    assert "multiple of 64, not 4: set model.head_width" in why(options("splash"))
    assert "to multiples of 128, a waste for 9 queries" in why(image=128, t=9)
    assert backend_of(wide, "tpu", image=196, t=64) == "splash"
    documents = with_positions(in_order({"image": 128, "t": 128}))
    because = why(wide, "tpu", "causal", "image", documents)
    assert "in packed documents or beside a cache" in because


def join_rows(parts):
    """The metadata of batches, one below the other."""
    return jax.tree.map(lambda *each: jnp.concatenate(each), *parts)


def test_order_is_forgotten_where_it_becomes_data():
    """Static order is what fast kernels go by: a cache's slots and placed tokens have none."""
    text = single_document(jnp.ones((1, 4), bool), Group("t", "text", 4))
    assert text.groups[0].start == 0 and offset_positions(text, {}, 3).groups[0].start == 3
    arrays = {key: jnp.zeros((1, 4), jnp.int32) for key in ("position", "segment", "document")}
    assert offset_positions(text, arrays, 3).groups[0].start is None
    padded = text.replace(groups=(text.groups[0]._replace(valid_first=True),))
    assert not lengthen(padded, text).groups[0].valid_first
    for items in (1, 2):  # one may be missing before another
        rows = join_rows([padded] * items)
        batch = {"present": jnp.ones((1, items), bool)}
        joined = unfold_items(jnp.zeros((items, 4, 8)), rows, batch, 0).metadata
        assert joined.groups[0].valid_first == (items == 1)
    assert [group.start for group in lengthen(text, text).groups] == [None]
    other = text.replace(groups=(Group("u", "text", 4, 0),))
    assert [group.start for group in lengthen(text, other).groups] == [0, None]


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.sampled_from([1, 5]),
    st.sampled_from([1, 5]),
    st.integers(0, 2**31),
)
def test_a_mask_known_beforehand_is_the_mask_of_the_metadata(rule, image, text, seed):
    metadata = in_order({"image": image, "t": text}, seed=seed)
    metadata = metadata.replace(valid=jnp.ones_like(metadata.valid))
    table = MaskTable((View("t", rule),))
    for call in plan_attention(options("xla"), table, metadata, metadata).calls:
        mask = np.asarray(block_mask(call, metadata, metadata))[0]
        known = static_mask(*cut(call, metadata, metadata))
        np.testing.assert_array_equal(known, mask)


HALF = {"width": 64, "dtype": jnp.bfloat16}


def test_what_cudnn_cannot_do_it_refuses(monkeypatch):
    half = options("cudnn", **HALF)

    def why(asked=half, platform="gpu", **lengths):
        with pytest.raises(ValueError, match="model.attention='cudnn'") as caught:
            backend_of(asked, platform, **lengths)
        return str(caught.value)

    assert backend_of(half, "gpu") == "cudnn"
    assert "needs an NVIDIA GPU, and this runs on cpu" in why(platform="cpu")
    assert "not in float32: set model.dtype='bfloat16'" in why(options("cudnn", width=64))
    assert "up to 128 here, not 4: set" in why(options("cudnn", dtype=jnp.bfloat16))
    too_wide = options("cudnn", width=192, dtype=jnp.bfloat16)
    assert "up to 128 here, not 192: set model.head_width" in why(too_wide)
    assert "not 127 x 255: change the number" in why(image=128, t=127)
    # Where all is seen there is no mask, and any length will do.
    assert backend_of(half, "gpu", "joint", image=128, t=127) == "cudnn"
    monkeypatch.setattr(cudnn, "widest_head", lambda: 256)
    assert backend_of(too_wide, "gpu") == "cudnn"


def test_keys_are_sorted_for_cudnn_only_where_some_may_be_missing_before_others():
    """A picture is there or not, a text's padding is at its end; together they may have gaps."""

    def sorts(rule):
        parts = []
        for name, length, there in (("image", 8, [8, 0]), ("t", 6, [4, 6])):
            valid = jnp.arange(length) < jnp.array(there)[:, None]
            group = Group(name, "text" if name == "t" else name, length, valid_first=True)
            parts.append(offset_positions(single_document(valid, group), {}, 8 * len(parts)))
        metadata = join_metadata(parts)
        arrays = heads_of(metadata, metadata, 11, 4, 2, 64)
        table = MaskTable((View("t", rule),))
        with on("gpu"), pytest.MonkeyPatch.context() as patch:
            plan = plan_attention(options("cudnn", **HALF), table, metadata, metadata)
            plain = jax.nn.dot_product_attention
            patch.setattr(
                jax.nn,
                "dot_product_attention",
                lambda *args, implementation, **more: plain(*args, **more),
            )
            run = partial(attended, plan, cudnn.attend)
            agree(run, arrays, reference_mask(table, metadata, metadata))
            return "argsort" in str(jax.make_jaxpr(run)(*arrays[:3]))

    assert sorts("joint") and not sorts("separate")


@pytest.mark.parametrize("rule", ["prefix", "joint", "separate"])
def test_what_cudnn_is_given_means_what_the_rule_says(rule, monkeypatch):
    """Its kernel runs on NVIDIA alone: here XLA computes what the kernel is asked for."""
    asked = []
    plain = jax.nn.dot_product_attention

    def instead(query, key, value, *, implementation, mask=None, key_value_seq_lengths=None):
        asked.append((implementation, mask is not None, key_value_seq_lengths is not None))
        lengths = key_value_seq_lengths
        return plain(query, key, value, mask=mask, key_value_seq_lengths=lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    metadata = in_order({"image": 8, "t": 6})
    metadata = metadata.replace(valid=metadata.valid.at[1, :8].set(False))
    table = MaskTable((View("t", rule),))
    with on("gpu"):
        plan = plan_attention(options("cudnn", **HALF), table, metadata, metadata)
    agree(
        partial(attended, plan, cudnn.attend),
        heads_of(metadata, metadata, 11, 4, 2, 64),
        reference_mask(table, metadata, metadata),
    )
    by_length, by_mask = ("cudnn", False, True), ("cudnn", True, False)
    assert set(asked) == ({by_length, by_mask} if rule == "prefix" else {by_length})


def test_auto_goes_by_device_shape_and_rule():
    half, whole = options("auto", **HALF), options("auto", width=64)
    long = {"image": 256, "t": 1024}
    assert backend_of(whole, "cpu") == "xla"
    assert backend_of(whole, "cpu", **long) == "chunked"
    assert backend_of(half, "gpu") == "cudnn"
    assert backend_of(whole, "gpu") == "xla"
    assert backend_of(whole, "gpu", **long) == "chunked"
    assert backend_of(half, "tpu") == "splash"
    assert backend_of(whole, "tpu", image=100, t=100) == "splash"
    assert backend_of(whole, "tpu", image=100, t=4) == "xla"


def test_what_was_chosen_is_read_off_the_traced_program():
    metadata = in_order({"image": 8, "t": 6})
    table = MaskTable((View("t", "prefix"),))
    run = by_calls("chunked", table, metadata, metadata, chunked.attend)
    arrays = heads_of(metadata, metadata, 0)[:3]
    gradient = jax.grad(lambda *arrays: jax.jit(run)(*arrays).sum())
    assert chosen(jax.make_jaxpr(gradient)(*arrays).jaxpr) == "chunked for 6 x 14, 8 x 8"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="model.attention=.flash.: must be one of auto, xla"):
        options("flash")


def planned(**changes):
    """The phase of a tiny run on one device."""
    config = Config(tiny.config_dict(train__micro_batches=2, **changes).to_dict())
    return abstract_phases(config, jax.devices()[:1])


def test_a_run_says_once_what_was_chosen_or_refuses_before_its_first_step():
    assert attention_line(planned() * 2) == "attention: xla for 4 x 4, 12 x 12, 12 x 16"
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU, and this runs on cpu"):
        attention_line(planned(model__attention="cudnn"))  # parameters have their shapes anyhow


def test_a_trained_model_is_asked_on_any_device():
    mesh = make_mesh({}, jax.devices()[:1])

    def asked(**changes):
        model = Predictor(tiny.task(**changes), None, mesh).task.model
        return model.options.attention, getattr(model, "tower", model.options).attention

    assert asked(model__attention="splash") == ("auto", "auto")
    assert asked(model__attention="chunked") == ("chunked", "chunked")
    late = {"model__fusion": "late", "model__tower__attention": "cudnn"}
    none = {"objectives__matching__weight": 0.0, "objectives__captioning__weight": 0.0}
    assert asked(**late, **none) == ("auto", "auto")
