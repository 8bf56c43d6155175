"""Block calls against the whole mask by definition, for any layout of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_rules
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.masks import reference_mask
from unified_mm.nn.attention.rules import (
    ALL,
    CAUSAL,
    NONE,
    PREDICATES,
    RULES,
    TEXT,
    AttentionRule,
    MaskTable,
    View,
    plan_passes,
    share_readings,
)
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, TokenMetadata, Tokens, concatenate, offset_positions

rules = st.sampled_from(sorted(RULES))
OPTIONS = TransformerOptions(8, 1, 2, 8, attention="xla")
# Each rule in words: what text sees of text and of context; what context sees of text, of its own
# modality, and of another one.
WORDS = {
    "separate": ("all", "none", "none", "all", "none"),
    "separate_causal": ("causal", "none", "none", "all", "none"),
    "prefix": ("causal", "all", "none", "all", "all"),
    "prefix_separate": ("causal", "all", "none", "all", "none"),
    "joint": ("all", "all", "all", "all", "all"),
    "causal": ("causal", "causal", "none", "causal", "causal"),
    "in_order": ("causal", "causal", "causal", "causal", "causal"),
    "interleaved": ("causal", "causal", "causal", "block_causal", "causal"),
    "interleaved_latest": ("causal", "same_segment", "causal", "block_causal", "causal"),
}


@st.composite
def layouts(draw):
    """Texts under rules of their own beside up to two context modalities, and a seed."""
    views = tuple(View(f"t{i}", draw(rules)) for i in range(draw(st.integers(1, 3))))
    contexts = draw(st.sampled_from([(), ("image",), ("image", "sound")]))
    groups = [Group(name, name, draw(st.integers(1, 4))) for name in contexts]
    groups += [Group(view.name, "text", draw(st.integers(1, 4))) for view in views]
    return views, tuple(groups), draw(st.integers(0, 2**31))


def filled(groups, seed):
    """Tokens with metadata of any kind."""
    rng = np.random.default_rng(seed)
    shape = (2, sum(group.length for group in groups))
    return TokenMetadata(
        position=jnp.asarray(rng.integers(0, 6, shape)),
        segment=jnp.asarray(rng.integers(0, 3, shape)),
        document=jnp.asarray(rng.integers(0, 2, shape)),
        valid=jnp.asarray(rng.random(shape) < 0.7),
        groups=groups,
    )


def by_blocks(table, queries, keys):
    """The whole mask, put together from the block calls' parts."""
    mask = jnp.zeros((2, queries.valid.shape[1], keys.valid.shape[1]), bool)
    covered = np.zeros(queries.valid.shape[1], int)
    plan = plan_attention(OPTIONS, table, queries, keys)
    for call, seen_by in zip(plan.calls, plan.masks, strict=True):
        part = seen_by.dense
        covered[slice(*call.queries)] += 1
        start = 0
        for low, high, *_ in call.keys:
            seen = part[:, :, start : start + high - low]
            mask = mask.at[:, slice(*call.queries), low:high].max(seen)
            start += high - low
        assert start == part.shape[2]
    assert (covered <= 1).all()  # no query is in two calls; in none, it sees nothing
    return mask


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_block_calls_and_the_reference_mask_are_the_rules_in_words(drawn):
    views, groups, seed = drawn
    table, metadata = MaskTable(views), filled(groups, seed)
    mask = np.asarray(reference_mask(table, metadata, metadata))
    blocks = jax.jit(lambda metadata: by_blocks(table, metadata, metadata))
    np.testing.assert_array_equal(blocks(metadata), mask)
    owner = [group for group in metadata.groups for _ in range(group.length)]
    rule_of = {view.name: WORDS[view.rule] for view in table.views}
    first = WORDS[table.views[0].rule]
    names = ("position", "segment", "document", "valid")
    position, segment, document, valid = (np.asarray(getattr(metadata, f)) for f in names)
    for b in range(2):
        for q, query in enumerate(owner):
            for k, key in enumerate(owner):
                if query.modality == key.modality == "text":
                    rule = rule_of[query.name][0] if query.name == key.name else "none"
                elif query.modality == "text":
                    rule = rule_of[query.name][1]
                elif key.modality == "text":
                    rule = rule_of[key.name][2]
                elif query.modality == key.modality:
                    rule = first[3]
                else:
                    rule = first[4]
                before = position[b, k] <= position[b, q]
                same = segment[b, k] == segment[b, q]
                seen = {
                    "none": False,
                    "all": True,
                    "causal": before,
                    "same_segment": same,
                    "block_causal": before or same,
                }
                expected = seen[rule] and valid[b, k] and document[b, k] == document[b, q]
                assert mask[b, q, k] == expected, (b, query, key)


def test_neighbours_with_equal_rows_share_a_call():
    groups = (Group("image", "image", 4), Group("a", "text", 3), Group("b", "text", 3))
    metadata = filled(groups, 0)
    table = MaskTable((View("a", "prefix"), View("b", "prefix")))
    calls = plan_attention(OPTIONS, table, metadata, metadata).calls
    assert [call.queries for call in calls] == [(0, 4), (4, 7), (7, 10)]
    assert calls[2].keys == ((0, 4, ALL, None), (7, 10, CAUSAL, None))
    metadata = filled(groups[:2], 0)
    joint = MaskTable((View("a", "joint"),))
    (call,) = plan_attention(OPTIONS, joint, metadata, metadata).calls
    assert call.queries == (0, 7) and call.keys == ((0, 7, ALL, None),)


def test_texts_share_a_pass_where_the_context_comes_out_alike():
    contrast, caption = View("c", "separate"), View("w", "prefix", autoregressive=True)
    causal, joint, joint2 = View("o", "causal"), View("j", "joint"), View("k", "joint")
    assert plan_passes([contrast, caption], ["image"]) == [(contrast, caption)]
    # With two contexts, one rule lets them see each other and the other does not.
    assert plan_passes([contrast, caption], ["image", "sound"]) == [(contrast,), (caption,)]
    assert plan_passes([contrast, causal, caption], ["image"]) == [(contrast, caption), (causal,)]
    # A text that the context sees shares with none.
    assert plan_passes([joint, caption, joint2], ["image"]) == [(joint,), (caption,), (joint2,)]
    assert plan_passes([], ["image"]) == []


def in_text(rule):
    """What text sees of itself."""
    return rule.between(TEXT, TEXT, (True, True))[0]


def test_contexts_that_are_read_apart_share_the_pass_of_contrast():
    contrast = View("c", "separate")
    caption = View("w", "prefix_separate", autoregressive=True)
    assert plan_passes([contrast, caption], ["image", "sound"]) == [(contrast, caption)]


def test_texts_that_read_alike_are_read_once():
    contexts = ["image", "sound"]
    a, b = View("a", "separate"), View("b", "separate")
    order, written = View("o", "separate_causal"), View("w", "separate", autoregressive=True)
    again = View("again", "separate", alone=True)
    found = share_readings([a, b, order, written, again], contexts)
    assert found == {"a": a, "b": a, "o": order, "w": order, "again": again}
    # With one context alone these two rules differ in nothing.
    apart = View("p", "prefix_separate", autoregressive=True)
    prefix = View("q", "prefix", autoregressive=True)
    assert share_readings([apart, prefix], ["image"])["q"] == apart
    assert share_readings([apart, prefix], contexts)["q"] == prefix


def test_the_first_pattern_that_fits_holds():
    rule = AttentionRule.of(
        "mine",
        {
            ("text", "sound"): "none",
            ("written", "read"): "all",
            ("sound", "same"): "causal",
            ("*", "same"): "all",
            ("read", "*"): "same_segment",
        },
    )
    image, sound, text = (Group(name, name, 2) for name in ("image", "sound", "text"))
    said = {
        (text, sound, (True, False)): NONE,
        (text, image, (True, False)): ALL,
        (text, text, (True, True)): ALL,
        (sound, sound, (False, False)): CAUSAL,
        (image, image, (False, False)): ALL,
        (image, sound, (False, False)): PREDICATES["same_segment"],
        (image, text, (False, True)): PREDICATES["same_segment"],
        (text, image, (False, False)): PREDICATES["same_segment"],
    }
    for (query, key, written), expected in said.items():
        assert rule.between(query, key, written) == (expected, None), (query, key, written)


def test_a_rule_from_outside_is_resolved_and_hides_the_future():
    rule = View("t", "toy_rules:WINDOWED", autoregressive=True).resolved
    # Its window is not known to hide the future, so that text is made causal.
    assert in_text(View("t", "toy_rules:WINDOWED").resolved) == toy_rules.Window(2)
    assert in_text(rule) == CAUSAL and rule.to_context("image") == toy_rules.Window(3)
    with pytest.raises(ValueError, match="would see the one it must predict"):
        View("t", "toy_rules:LEAKY", autoregressive=True)
    with pytest.raises(ValueError, match="'toy_rules:Window' is a type"):
        View("t", "toy_rules:Window")
    with pytest.raises(ValueError, match="unknown attention predicate 'cuasal'"):
        AttentionRule.of("t", {("*", "*"): "cuasal"})


@pytest.mark.parametrize(
    "table",
    [
        # Text sees sound, sound sees the image, and the image sees the later text.
        {
            ("image", "written"): "all",
            ("written", "sound"): "all",
            ("sound", "image"): "all",
            ("read", "same"): "all",
            ("written", "written"): "causal",
        },
        # In documents text sees a later image, which has seen the text up to itself.
        {
            ("read", "written"): "causal",
            ("written", "read"): "all",
            ("read", "read"): "all",
            ("written", "written"): "causal",
        },
        # An image sees the text of its own segment, which comes after it.
        {("read", "written"): "same_segment", ("*", "*"): "causal"},
    ],
)
def test_a_rule_that_shows_the_future_on_a_way_round_is_refused(table, monkeypatch):
    rule = AttentionRule.of("round", table)
    assert rule.shows_the_future
    monkeypatch.setitem(RULES, "round", rule)
    with pytest.raises(ValueError, match="would see the one it must predict"):
        View("t", "round", autoregressive=True)
    assert View("t", "round").resolved == rule


def test_rules_of_ours_show_no_future_but_one():
    assert [name for name, rule in RULES.items() if rule.shows_the_future] == ["joint"]
    # Text that is blind to the context may be seen by it.
    blind = AttentionRule.of("b", {("read", "*"): "all", ("written", "written"): "causal"})
    assert not blind.shows_the_future


def test_wrong_rules_and_groups_are_refused():
    with pytest.raises(ValueError, match="unknown attention rule .suffix.. Built in: causal"):
        View("t", "suffix")
    with pytest.raises(ValueError, match="t: rule 'joint' lets the context see the text"):
        View("t", "joint", autoregressive=True)
    assert in_text(View("t", "separate").resolved) == ALL
    assert in_text(View("t", "separate", autoregressive=True).resolved) == CAUSAL
    zeros = jnp.zeros((1, 2), jnp.int32)
    metadata = TokenMetadata(zeros, zeros, zeros, zeros == 0, (Group("image", "image", 2),))
    part = Tokens(jnp.zeros((1, 2, 3)), metadata)
    with pytest.raises(ValueError, match="two token groups share a name"):
        concatenate([part, part])
    assert (np.asarray(offset_positions(metadata, {}, 3).position) == 3).all()
