"""Experts against a loop over tokens, and who learns of whom by what is dropped."""

import functools
import math
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.costs.flops import matmul_flops
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.feed_forward import Mlp
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, join_metadata, single_document
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.sharding import path_of, rule_items, without_names

WIDTH, HIDDEN, ROWS = 8, 12, 4
SIZES = {"image": 6, "caption": 5, "contrast": 5}
STARTS = {"image": 0, "caption": 6, "contrast": 11}
VIEWS = (View("caption", "prefix", autoregressive=True), View("contrast", "separate"))


def options(**own):
    given = tuple(sorted({"noise": 0.0, "count": 4, **own}.items()))
    return TransformerOptions(
        WIDTH, 2, 2, HIDDEN, feed_forward_type="experts", feed_forward_options=given
    )


@functools.cache
def inputs(views=VIEWS, documents=False):
    """Embeddings and plan of a picture and two texts, some of whose tokens are padding."""
    rng = np.random.default_rng(0)
    parts = []
    for name, size in SIZES.items():
        valid = jnp.asarray(rng.random((ROWS, size)) < 0.8)
        group = Group(name, "image" if name == "image" else "text", size)
        part = single_document(valid, group)
        if documents:
            part = part.replace(groups=(group,))
        parts.append(part)
    metadata = join_metadata(parts)
    plan = plan_attention(options(), MaskTable(views), metadata, metadata)
    x = rng.normal(size=(ROWS, sum(SIZES.values()), WIDTH)).astype(np.float32)
    return jnp.asarray(x), plan


def built(own, ties=False):
    """A module in training without noise, its parameters, and `x -> y`."""
    o = options(**own)
    module = o.make_feed_forward(options=o)
    x, plan = inputs()
    shapes = without_names(jax.eval_shape(module.init, jax.random.key(0), x, plan)["params"])
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(0 * drawn if ties and "router" in path_of(path) else 0.5 * drawn)

    params = jax.tree_util.tree_map_with_path(draw, shapes)

    @jax.jit
    def run(params, x, valid):
        given = plan.replace(deterministic=False, valid=valid)
        return module.apply({"params": params}, x, given)

    return module, params, run


def mlp(experts, e, x):
    hidden = x @ experts["up"]["kernel"][e] + experts["up"]["bias"][e]
    return nn.gelu(hidden) @ experts["down"]["kernel"][e] + experts["down"]["bias"][e]


def by_loop(module, params, x, valid):
    """Which experts take which token, [B, N, E], by the definition of each order."""
    taken = np.zeros((*valid.shape, module.count), bool)
    p = np.zeros((*valid.shape, module.count), np.float32)
    for name, size in SIZES.items():
        modality = "image" if name == "image" else "text"
        pool = "all" if module.by == "all" else modality
        order = module.order if modality == "image" else "place"
        span = slice(STARTS[name], STARTS[name] + size)
        p[:, span] = nn.softmax(x[:, span] @ params[f"router_{pool}"]["kernel"])
        bias = np.asarray(params.get(f"balance_{pool}", np.zeros(module.count)))
        share = 1 if order == "choice" else module.group
        room = math.ceil(share * size * module.top_k * module.capacity / module.count)
        for first in range(0, ROWS, share):
            tokens = [
                (row, place)
                for place in range(span.start, span.stop)
                for row in range(first, first + share)
                if valid[row, place]
            ]
            best = {token: np.argsort(-(p[token] + bias), kind="stable") for token in tokens}
            if order == "choice":
                for e in range(module.count):
                    for token in sorted(tokens, key=lambda token: -p[token][e])[:room]:
                        taken[*token, e] = True
                continue
            asks = [(token, k) for token in tokens for k in range(module.top_k)]
            if order == "priority":
                asks.sort(key=lambda ask: (ask[1], -p[ask[0]].max()))
            for token, k in asks:
                e = best[token][k]
                kept = module.dropless or (modality == "text" and not module.drop_text)
                if kept or taken[first : first + share, span, e].sum() < room:
                    taken[*token, e] = True
    chosen = np.zeros_like(taken)
    np.put_along_axis(chosen, np.argsort(-p, kind="stable")[..., : module.top_k], True, axis=-1)
    return taken, taken if module.order == "choice" else chosen


def by_einsum(module, params, x, taken, chosen):
    """All experts on all tokens, weighted by zero where they did not take it."""
    outputs = 0.0
    for name, size in SIZES.items():
        span = slice(STARTS[name], STARTS[name] + size)
        pool = "all" if module.by == "all" else ("image" if name == "image" else "text")
        own, experts = x[:, span], params[f"experts_{pool}"]
        p = nn.softmax(own @ params[f"router_{pool}"]["kernel"])
        if module.gate == "scaled":
            gates = p * module.count / module.top_k
        else:
            image = name == "image"
            of = chosen[:, span] if image or module.order != "choice" else None
            if of is None:
                best = jnp.argsort(-p, stable=True)[..., : module.top_k]
                of = jax.nn.one_hot(best, module.count, dtype=bool).any(-2)
            total = jnp.where(of, p, 0).sum(-1, keepdims=True)
            gates = p / jax.lax.stop_gradient(jnp.where(total > 0, total, 1))
        made = jnp.stack([mlp(experts, e, own) for e in range(module.count)], axis=2)
        y = jnp.einsum("bne,bned->bnd", gates * taken[:, span].astype(jnp.float32), made)
        outputs = [*outputs, y] if isinstance(outputs, list) else [y]
    y = jnp.concatenate(outputs, axis=1)
    if module.shared:
        shared = jax.tree.map(lambda leaf: leaf[None], params["shared_expert"])
        y = y + mlp(shared, 0, x)
    return y


WAYS = {
    "top-1": {"capacity": 0.7},
    "top-2, groups": {"top_k": 2, "group": 2, "capacity": 0.6},
    "top-3, by modality": {"top_k": 3, "by": "modality", "gate": "normalised", "capacity": 0.3},
    "priority": {"top_k": 2, "order": "priority", "capacity": 0.7, "group": 4, "shared": True},
    "choice": {"order": "choice", "capacity": 1.0, "gate": "normalised", "group": 2},
    "dropless": {"top_k": 2, "dropless": True},
    "all text": {"order": "priority", "capacity": 0.5, "group": 2, "drop_text": False},
    "bias": {"bias_balance": True, "capacity": 0.7},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_output_and_gradient_are_those_of_a_loop(way):
    """Of drawn routers, and of one that finds all experts alike."""
    module, params, run = built(WAYS[way])
    x, plan = inputs()
    weights = jax.random.normal(jax.random.key(3), x.shape)

    def both(function):
        def total(params, x, *more):
            y = function(params, x, *more)
            return (y * weights).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    ours, theirs = both(lambda p, x: run(p, x, plan.valid)), both(partial(by_einsum, module))
    for ties in (False, True):
        given = built(WAYS[way], ties)[1] if ties else params
        taken, chosen = by_loop(module, given, x, np.asarray(plan.valid))
        if "dropless" in WAYS[way]:
            assert taken.sum() == module.top_k * plan.valid.sum()
        elif not ties:
            assert 0 < taken.any(-1).sum() < plan.valid.sum()  # something is dropped
        (total, y), slopes = ours(given, x)
        (other, expected_y), expected = theirs(given, x, taken, chosen)
        np.testing.assert_allclose(y, expected_y, atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(total, other, rtol=1e-5)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(slopes), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=path_of(path[1:]))
            if "router" in path_of(path[1:]) and not ties:
                assert np.abs(b).max() > 1e-3


@pytest.mark.parametrize("own", [{}, {"dropless": True}, {"order": "choice"}])
def test_one_expert_with_room_for_all_is_the_dense_layer(own):
    module, params, run = built({"count": 1, "gate": "normalised", "capacity": 1.0, **own})
    x, plan = inputs()
    dense = Mlp(module.options)
    one = jax.tree.map(lambda leaf: leaf[0], params["experts_all"])
    expected = jnp.where(plan.valid[..., None], dense.apply({"params": one}, x), 0)
    np.testing.assert_allclose(run(params, x, plan.valid), expected, atol=1e-6)


PERTURBED = {
    "the other text": (slice(None), slice(STARTS["contrast"], None)),
    "later words": (slice(None), slice(STARTS["caption"] + 2, STARTS["caption"] + 5)),
    "another example": (slice(1, None), slice(None)),
}


@pytest.mark.parametrize("what", PERTURBED)
@pytest.mark.parametrize("way", ["place", "priority", "choice", "modality", "dropless"])
def test_no_bit_tells_of_what_a_token_must_not_know(way, what):
    """Outputs of the first example's picture and first words, as other inputs change."""
    own = {"by": "modality"} if way == "modality" else {"order": way}
    own = {"dropless": True} if way == "dropless" else {**own, "capacity": 0.6}
    _, params, run = built({**own, "top_k": 2})
    x, plan = inputs()
    before = run(params, x, plan.valid)[0, : STARTS["caption"] + 2]
    changed = 0
    for seed in range(5):
        drawn = np.random.default_rng(seed)
        other, valid = np.array(x), np.array(plan.valid)
        other[PERTURBED[what]] = drawn.normal(size=other[PERTURBED[what]].shape)
        valid[PERTURBED[what]] = drawn.random(valid[PERTURBED[what]].shape) < 0.7
        after = run(params, jnp.asarray(other), jnp.asarray(valid))
        np.testing.assert_array_equal(after[0, : STARTS["caption"] + 2], before)
        changed += np.any(np.asarray(after) != np.asarray(run(params, x, plan.valid)))
    assert changed == 5


def test_where_nothing_is_drawn_a_context_alone_has_the_room_of_evaluation():
    """Of each example by itself, so that no other one changes a bit."""
    own = {"capacity": 0.1, "evaluation_capacity": 0.7, "top_k": 2, "group": 2}
    module, params, _ = built(own)
    x, plan = inputs()
    whole = options(**own | {"evaluation_capacity": 0.0})
    every = whole.make_feed_forward(options=whole).apply({"params": params}, x, plan)
    found = module.apply({"params": params}, x, plan)
    taken, chosen = by_loop(replace(module, group=1, capacity=0.7), params, x, plan.valid)
    picture = slice(0, SIZES["image"])
    assert taken[:, picture].sum() < (chosen & plan.valid[..., None])[:, picture].sum()
    expected = by_einsum(module, params, x, taken, chosen)
    np.testing.assert_allclose(found[:, picture], expected[:, picture], atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(found[:, SIZES["image"] :], every[:, SIZES["image"] :])
    other = module.apply({"params": params}, x.at[1:].mul(-1), plan)
    np.testing.assert_array_equal(found[0], other[0])


def test_a_gradient_without_drops_keeps_no_kernels_for_each_block():
    _, params, run = built({"dropless": True, "count": 2})
    x, plan = inputs()
    kept = jax.eval_shape(lambda p: jax.vjp(lambda p: run(p, x, plan.valid), p)[1], params)
    largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept))
    assert largest == 2 * WIDTH * HIDDEN  # of the kernels themselves


@pytest.mark.parametrize("stages", [1, 2])
def test_flops_are_counted_once_each_way(stages):
    """Recomputation is not the model's, nor are the stages of a pipeline that is left out."""
    o = replace(options(dropless=True), counted=True)
    x, plan = inputs()
    module = o.make_feed_forward(options=o)
    params = without_names(jax.eval_shape(module.init, jax.random.key(0), x, plan)["params"])

    def run(params, x):
        return module.apply({"params": params}, x, plan).sum()

    def counted(function, stages):
        mesh = make_mesh({"data": 2, "stage": stages}, jax.devices()[: stages * 2])
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            return matmul_flops(function, params, x)

    forward = counted(run, stages)
    assert forward == counted(run, 1)
    assert counted(jax.value_and_grad(run, (0, 1)), stages) == 3 * forward


def test_a_group_without_tokens_is_left_out():
    parts = [single_document(jnp.ones((2, n), bool), Group(name, name, n))
             for name, n in (("image", 0), ("text", 5))]  # fmt: skip
    metadata = join_metadata(parts)
    plan = plan_attention(options(), MaskTable((View("text", "prefix"),)), metadata, metadata)
    x = jnp.ones((2, 5, WIDTH))
    for own in ({}, {"dropless": True}):
        module = options(**own).make_feed_forward(options=options(**own))
        given = plan.replace(deterministic=False)
        y, _ = module.init_with_output(jax.random.key(0), x, given)
        assert y.shape == x.shape


def test_another_kind_has_none_of_the_options_of_the_one_before():
    changed = options().changed({"feed_forward_type": "dense"})
    assert changed.feed_forward_options == () and options().changed({}) == options()


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        ({"top_k": 5}, {}, "top_k=5 experts of a token, but there are count=4"),
        ({"order": "first"}, {}, "order='first': must be one of place, priority, choice"),
        ({"group": 3}, {}, "group=3 examples share an expert's room, and do not divide the 4"),
        ({"order": "priority"}, {"views": (View("caption", "causal", True),)}, "read in order"),
        ({"order": "choice"}, {"documents": True}, "read in order here .documents"),
    ],
)
def test_what_would_be_wrong_is_refused(own, changes, message):
    x, plan = inputs(**changes)
    plan = plan.replace(deterministic=False)
    o = options(**own)
    module = o.make_feed_forward(options=o)
    with pytest.raises(ValueError, match=message):
        params = jax.eval_shape(module.init, jax.random.key(0), x, inputs()[1])["params"]
        jax.eval_shape(lambda p: module.apply({"params": p}, x, plan), params)


def test_experts_stand_in_every_second_block():
    o = options(every=2)
    assert (o.blocks_per_period, o.periods) == (2, 1)
    assert [o.of_block(number).feed_forward_type for number in range(2)] == ["dense", "experts"]
    with pytest.raises(ValueError, match="every=3: must divide model.layers=2"):
        options(every=3)
