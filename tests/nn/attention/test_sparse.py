"""Sparse patterns against masks written out token by token, and the backend of their blocks."""

import json
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attending import Attending, agree, attended, heads_of, on

from unified_mm.models.unified import text_group
from unified_mm.nn.attention import blocked, splash
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.masks import block_mask, cut, static_mask
from unified_mm.nn.attention.patterns import First, NearInSpace, RandomBlocks, Sparse
from unified_mm.nn.attention.rules import ALL, CAUSAL, AttentionRule, MaskTable, View, Window
from unified_mm.nn.options import TransformerOptions, frozen
from unified_mm.nn.tokens import (
    Group,
    grid_coords,
    join_metadata,
    offset_positions,
    single_document,
    with_positions,
)
from unified_mm.parallel.sharding import without_names

TEXT, IMAGE = "text", "image"
OTHERS = {"early": {}, "gated_cross_attention": {"objectives__matching__weight": 0.0}}
GRID = (1, 4, 6)  # a class token, and 24 patches
SPARSE = {
    "window": {TEXT: {"window": 5}},
    "global": {TEXT: {"window": 3, "first": 2}},
    "random": {TEXT: {"window": 2, "random": 2, "block": 4, "seed": 3}},
    "grid": {IMAGE: {"grid": 1}},
    "both": {TEXT: {"window": 4, "first": 1}, IMAGE: {"grid": 1}},
}


def options(sparse, backend="xla", heads=4, key_value_heads=2, width=4):
    pairs = tuple((name, tuple(each.items())) for name, each in sparse.items())
    return TransformerOptions(
        heads * width, 1, heads, 8, key_value_heads=key_value_heads, attention=backend, sparse=pairs
    )


def sequence(text=37, seed=0):
    """A picture with a class token and a text after it, two examples with holes."""
    rng = np.random.default_rng(seed)
    image = Group(IMAGE, IMAGE, 25, grid=GRID)
    valid = [jnp.asarray(rng.random((2, length)) < 0.8) for length in (25, text)]
    picture = single_document(valid[0], image, np.zeros(25, np.float32), grid_coords(image))
    return join_metadata(
        [picture, offset_positions(single_document(valid[1], Group("t", TEXT, text)), {}, 25)]
    )


def packed(text=41):
    """Two documents of text in each row, laid out in order, pictures between their words."""
    position = np.stack([np.r_[0:20, 22 : text + 2], np.r_[0:13, 0 : text - 13] * 2])
    document = np.stack([np.zeros(text), np.arange(text) >= 13])
    one = with_positions(
        single_document(jnp.ones((2, text), bool), Group("t", TEXT, text)),
        position=jnp.asarray(position, jnp.int32),
        document=jnp.asarray(document, jnp.int32),
    )
    return one.replace(groups=tuple(each._replace(ordered=True) for each in one.groups))


def in_words(sparse, causal, metadata):
    """The mask [Q, K] of the groups that are sparse, token by token; random blocks are left out."""
    owner = [(group, n) for group in metadata.groups for n in range(group.length)]
    mask = np.zeros((len(owner), len(owner)), bool)
    for q, (mine, i) in enumerate(owner):
        for k, (other, j) in enumerate(owner):
            if mine.modality == IMAGE:
                seen = other.modality == IMAGE
            else:
                seen = other.modality == IMAGE or j <= i or not causal
            if seen and mine.name == other.name and mine.modality in sparse:
                own = sparse[mine.modality]
                near = abs(i - j) < own.get("window", 0)
                near |= min(i, j) < own.get("first", 0)
                if "grid" in own:
                    down, across = (
                        abs((i - 1) // 6 - (j - 1) // 6),
                        abs((i - 1) % 6 - (j - 1) % 6),
                    )
                    near |= i == 0 or j == 0 or max(down, across) <= own["grid"]
                seen = near
            mask[q, k] = seen
    return mask


def whole_mask(sparse, table, metadata):
    """The mask [B, Q, K] of the block calls of a plan, and the same by what is static."""
    shape = metadata.valid.shape
    mask = np.zeros((*shape, shape[1]), bool)
    for call in plan_attention(options(sparse), table, metadata, metadata).calls:
        part = np.asarray(block_mask(call, metadata, metadata))
        known = static_mask(*cut(call, metadata, metadata))
        hidden = metadata.valid[:, None]
        seen = np.concatenate([hidden[:, :, each.start : each.stop] for each in call.keys], axis=2)
        if known is not None:
            np.testing.assert_array_equal(part, known & seen)
        done = 0
        for each in call.keys:
            size = each.stop - each.start
            mask[:, slice(*call.queries), each.start : each.stop] = part[..., done : done + size]
            done += size
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["window", "global", "grid", "both"])
def test_patterns_are_what_they_say(name, causal):
    rule = AttentionRule.of(
        "r", {("written", "written"): "causal" if causal else "all",
              ("written", "read"): "all", ("read", "same"): "all"},
    )  # fmt: skip
    view = View("t", "prefix")
    object.__setattr__(view, "resolved", rule)
    metadata = sequence()
    expected = in_words(SPARSE[name], causal, metadata) & np.asarray(metadata.valid)[:, None]
    found = whole_mask(SPARSE[name], MaskTable((view,)), metadata)
    np.testing.assert_array_equal(found, expected)


def test_random_blocks_are_drawn_once_and_for_all():
    place = {"position": np.arange(60)[:, None]}, {"position": np.arange(60)[None]}
    seen = RandomBlocks(2, 4, seed=1).static(*place)
    assert np.array_equal(seen, seen.T)
    blocks = seen.reshape(15, 4, 15, 4)
    assert np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))
    drawn = np.tril(blocks[:, 0, :, 0]).sum(1)
    assert drawn.max() == 2 and drawn.min() >= 1 and drawn.mean() > 1.4
    assert not np.array_equal(seen, RandomBlocks(2, 4, seed=2).static(*place))
    # Also where positions are data, and later tokens change nothing.
    data = jnp.arange(30)[None]
    fields = {"position": data[:, :, None]}, {"position": data[:, None]}
    np.testing.assert_array_equal(RandomBlocks(2, 4, seed=1)(*fields)[0], seen[:30, :30])


def test_random_blocks_of_a_text_are_the_same_after_a_picture():
    table = MaskTable((View("t", "prefix"),))
    beside = whole_mask(SPARSE["random"], table, both := sequence())
    text = jax.tree.map(lambda x: x[:, 25:], both).replace(groups=(Group("t", TEXT, 37, start=0),))
    text = text.replace(position=text.position - 25, time=None, coords=None)
    alone = whole_mask(SPARSE["random"], table, text)
    np.testing.assert_array_equal(alone, beside[:, 25:, 25:])


@pytest.mark.parametrize(
    ("name", "what"),
    [("none", "whole"), ("random", "whole"), ("both", "whole"), ("window", "documents"),
     ("global", "documents")],
)  # fmt: skip
def test_blocks_are_the_masked_reference(name, what, monkeypatch):
    """Values and gradients, holes, odd lengths, heads that share keys, packed documents."""
    monkeypatch.setattr(blocked, "SIZE", 8)
    metadata = sequence() if what == "whole" else packed()
    table = MaskTable((View("t", "prefix", autoregressive=True),))
    arrays = heads_of(metadata, metadata, 2)

    def run(backend):
        plan = plan_attention(options(SPARSE.get(name, {}), backend), table, metadata, metadata)
        assert {each.backend for each in plan.masks} == {backend}

        @jax.jit
        def both(*arrays):
            found, pull = jax.vjp(lambda *a: Attending(plan).apply({}, *a), *arrays[:3])
            return found, pull(arrays[3])

        return jax.tree.leaves(both(*arrays))

    for found, expected in zip(run("blocks"), run("xla"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("what", ["whole", "documents"])
def test_few_blocks_are_listed(what):
    length = 2048
    metadata = single_document(jnp.ones((1, length), bool), Group("t", TEXT, length))
    if what == "documents":
        groups = tuple(each._replace(start=None, ordered=True) for each in metadata.groups)
        metadata = metadata.replace(groups=groups)
    table = MaskTable((View("t", "separate", autoregressive=True),))
    auto = options({TEXT: {"window": 129}}, "auto")
    (seen_by,) = plan_attention(auto, table, metadata, metadata).masks
    assert seen_by.backend == "blocks"
    listed = blocked.key_blocks(seen_by.call, metadata.groups, metadata.groups, 64)
    assert listed.shape == (32, 3) and listed[-1].tolist() == [29, 30, 31]
    dense = plan_attention(options({}, "auto"), table, metadata, metadata)
    assert dense.masks[0].backend == "chunked"  # nearly half of the blocks, but not all


def test_memory_grows_with_the_length():
    def temporary(length):
        metadata = single_document(jnp.ones((1, length), bool), Group("t", TEXT, length))
        table = MaskTable((View("t", "separate", autoregressive=True),))
        arrays = [jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)] * 3

        def total(*arrays):
            chosen = options({TEXT: {"window": 64, "first": 3}}, "blocks", 2, 2, 8)
            plan = plan_attention(chosen, table, metadata, metadata)
            return jnp.square(Attending(plan).apply({}, *arrays)).sum()

        program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(4096)
    assert long < 4.4 * short and long < 4096 * 4096 / 2


@pytest.mark.parametrize(
    "fusion", ["early", pytest.param("gated_cross_attention", marks=pytest.mark.slow)]
)
def test_a_text_written_on_beside_a_cache_is_the_text_read_at_once(fusion):
    sparse = {TEXT: {"window": 3, "first": 2}, IMAGE: {"grid": 1}}
    task = tiny.task(
        **OTHERS[fusion], model__fusion=fusion, model__sparse=sparse,
        data__image_size=32,
    )  # fmt: skip
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
        assert text_group(view, 12).length == cache.metadata.groups[-1].length
        second, _ = model.extend(cache, part(5, 12), view)
        beside = model.prefix(batch, view)
        begins = model.text_begins(beside, view)
        beside = beside.reserve(text_group(view, 12, begins))
        after, _ = model.extend(beside, part(0, 12), view)
        return whole, jnp.concatenate([first, second], axis=1), after

    def read(task):
        return jax.jit(lambda p: task.model.apply({"params": p}, method=run))(params)

    whole, parts, after = read(task)
    np.testing.assert_allclose(whole, parts, atol=2e-5)
    np.testing.assert_allclose(whole, after, atol=2e-5)
    other = read(tiny.replace_model(task, sparse=()))[0]
    assert np.abs(np.asarray(other - whole)).max() > 1e-3


def test_a_window_in_the_table_of_a_rule_stays_in_an_autoregressive_view():
    sparse = Sparse(CAUSAL, (Window(ALL, 2), First(1)))
    for own in (Window(CAUSAL, 3), sparse):
        rule = AttentionRule.of("r", {("written", "written"): own, ("written", "read"): "all"})
        assert rule.with_causal_text == rule and not rule.shows_the_future
    assert not Sparse(ALL, (Window(ALL, 2),)).causal


@pytest.mark.parametrize("name", ["both", pytest.param("random", marks=pytest.mark.slow)])
def test_splash_by_the_same_pattern(name):
    """Its program interpreted on a CPU, as a TPU would run it."""
    image = Group(IMAGE, IMAGE, 128, grid=(0, 8, 16))
    picture = single_document(
        jnp.ones((2, 128), bool), image, np.zeros(128, np.float32), grid_coords(image)
    )
    text = single_document(jnp.ones((2, 128), bool), Group("t", TEXT, 128))
    metadata = join_metadata([picture, offset_positions(text, {}, 128)])
    table = MaskTable((View("t", "prefix", autoregressive=True),))
    with on("tpu"):
        plan = plan_attention(options(SPARSE[name], "auto", 2, 2, 64), table, metadata, metadata)
    assert {each.backend for each in plan.masks} == {"splash"}
    mask = whole_mask(SPARSE[name], table, metadata)
    arrays = heads_of(metadata, metadata, 2, 2, 2, 64)
    attend = jax.tree_util.Partial(splash.attend, interpret=True)
    agree(lambda *a: attended(plan, attend, *a), arrays, mask)


def test_patterns_are_the_same_after_they_were_kept():
    given = {"sparse": {"image": {"grid": 2}, "text": {"window": 4, "first": 1}}}
    made = frozen(given)
    kept = json.loads(json.dumps(made))["sparse"]
    assert frozen({"sparse": dict(kept)}) == made and hash(made["sparse"])


def test_the_first_of_a_modality_are_not_guessed_where_pictures_stand_among_words():
    """A document that begins with its picture has no text at the first positions."""
    built = tiny.task(model__sparse={TEXT: {"window": 2, "first": 1}})
    params = without_names(built.abstract_params())
    for batch, refused in ((tiny.batch(built), False), (tiny.documents(built), True)):
        given = partial(built.metrics, deterministic=True)
        with pytest.raises(ValueError, match="first=1 and random=0") if refused else nullcontext():
            jax.eval_shape(given, params, batch, jax.random.key(0))


def test_what_cannot_be_is_refused():
    for sparse, message in (
        ({"sound": {"window": 2}}, r"model.sparse.sound: the model has no such modality, only"),
        ({TEXT: {"grid": 1}}, r"model.sparse.text.grid=1: its tokens lie on no grid of patches"),
        ({TEXT: {}}, r"model.sparse.text: says nothing of what its tokens see; set window"),
        ({TEXT: {"windows": 2}}, r"model.sparse.text.windows: .* did you mean window"),
        ({TEXT: {"window": -1}}, r"model.sparse.text.window=-1: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.task(model__sparse=sparse).abstract_params()
    with pytest.raises(ValueError, match=r"compares places \(NearInSpace\), but the tokens have"):
        NearInSpace(0.1, 0.1)({}, {})
    faded = MaskTable((View("t", "toy_rules:FADED"),))
    with pytest.raises(ValueError, match="'blocks' adds nothing to scores, and a rule adds Fading"):
        plan_attention(options({}, "blocks"), faded, sequence(), sequence())
