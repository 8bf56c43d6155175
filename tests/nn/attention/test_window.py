"""A sliding window: a token sees what its rule lets it see, where that is near."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.masks import block_mask, static_mask
from unified_mm.nn.attention.rules import ALL, CAUSAL, MaskTable, Predicate, View, Window
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document

OPTIONS = TransformerOptions(width=8, layers=1, heads=2, feed_forward=8, window=3)


def test_the_mask_of_a_causal_text():
    text = single_document(jnp.ones((1, 6), bool), Group("t", "text", 6))
    table = MaskTable((View("t", "separate", autoregressive=True),))
    plan = plan_attention(OPTIONS, table, text, text)
    place = np.arange(6)
    distance = place[:, None] - place
    expected = (distance >= 0) & (distance < 3)
    assert np.array_equal(plan.masks[0].dense[0], expected)
    assert np.array_equal(static_mask(plan.calls[0], text, text), expected)
    # By position, not by place: in a cache, or in a packed document.
    moved = text.replace(position=text.position * 2)
    (call,) = plan.calls
    assert np.array_equal(block_mask(call, moved, moved)[0], (distance >= 0) & (distance < 2))


def test_what_it_lets_through_of_another_predicate():
    class Odd(Predicate):
        pass

    place = np.arange(5)[:, None]
    both = Window(ALL, 2).in_order(place, place.T)
    assert np.array_equal(both, np.abs(place - place.T) < 2)
    assert Window(Odd(), 2).in_order(place, place.T) is None
    assert Window(CAUSAL, 2) == Window(CAUSAL, 2) != Window(CAUSAL, 3)


@pytest.mark.parametrize("window", [0, 2])
def test_a_window_is_of_the_text_and_not_of_the_picture_that_it_looks_at(window):
    task = tiny.task(
        model__fusion="gated_cross_attention",
        model__cross__start=0.5,
        model__window=window,
        objectives__contrastive__weight=0.0,
        objectives__matching__weight=0.0,
    )
    (objective,) = task.objectives
    params, batch = tiny.params(task), tiny.batch(task, 1)
    batch["text"]["valid"] = np.ones((1, 12), bool)

    @jax.jit
    def last(batch):
        def encode(model, batch):
            return model.encode(batch, objective.views())[objective.name].text[0, -1]

        return task.model.apply({"params": params}, batch, method=encode)

    def with_first(token):
        ids = np.array(batch["text"]["ids"])
        ids[0, 0] = token
        return {**batch, "text": {**batch["text"], "ids": ids}}

    # Two layers of a window of 2 tokens reach 2 tokens back.
    assert np.array_equal(last(with_first(5)), last(with_first(9))) == bool(window)
    other = {**batch["image"], "pixels": batch["image"]["pixels"] * 0.5}
    assert not np.array_equal(last(batch), last({**batch, "image": other}))
