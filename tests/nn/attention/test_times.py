"""What tokens say of time and place: rules that read it, and positions that are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rotary import UNITS, rotary_places, rotary_rates, rotate
from unified_mm.nn.attention.rules import RULES, AttentionRule, MaskTable, NearInTime, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, Tokens, concatenate, single_document, unfold_items

OPTIONS = TransformerOptions(8, 1, 2, 8)
ALL = {
    "near": AttentionRule.of("near", {("read", "same"): NearInTime(0.25)}),
    "past": AttentionRule.of("past", {("read", "same"): "past"}),
}


def tokens(name, times, width=8):
    count = len(times)
    valid = jnp.ones((1, count), bool)
    coords = np.arange(3 * count, dtype=np.float32).reshape(count, 3) / 10
    metadata = single_document(valid, Group(name, name, count), np.float32(times), coords)
    return Tokens(jnp.zeros((1, count, width)), metadata)


def text(count, name="t"):
    metadata = single_document(jnp.ones((1, count), bool), Group(name, "text", count))
    return Tokens(jnp.zeros((1, count, 8)), metadata)


def mask_of(rule, metadata):
    (seen_by,) = plan_attention(
        OPTIONS, MaskTable((View("t", rule, with_text=False),)), metadata, metadata
    ).masks
    return np.asarray(seen_by.dense)[0]


def test_rules_read_the_clock(monkeypatch):
    for name, rule in ALL.items():
        monkeypatch.setitem(RULES, name, rule)
    times = np.array([0.0, 0.2, 0.4, 0.1])
    metadata = tokens("audio", times).metadata
    apart = times[None] - times[:, None]
    np.testing.assert_array_equal(mask_of("near", metadata), np.abs(apart) <= 0.25)
    np.testing.assert_array_equal(mask_of("past", metadata), apart <= 0)
    with pytest.raises(ValueError, match="compares times .* but the tokens have none"):
        mask_of("near", text(3, "other").metadata)


def test_what_has_no_place_gets_zeros_beside_what_has():
    both = concatenate([tokens("audio", [0.5, 1.5]), text(2)]).metadata
    assert both.time.tolist() == [[0.5, 1.5, 0.0, 0.0]]
    assert both.coords.shape == (1, 4, 3) and not both.coords[0, 2:].any()
    assert concatenate([text(2)]).metadata.time is None
    items = tokens("audio", [0.5, 1.5]).metadata
    arrays = {"present": jnp.ones((1, 1), bool)}
    unfolded = unfold_items(jnp.zeros((1, 2, 8)), items, arrays, 0).metadata
    assert unfolded.time.tolist() == [[0.5, 1.5]] and unfolded.groups[0].placed


def test_rotary_turns_by_time_row_and_column():
    both = concatenate([tokens("audio", [0.5, 1.5]), text(2)]).metadata
    places = np.asarray(rotary_places(both))[0]
    coords = np.asarray(both.coords)[0]
    np.testing.assert_allclose(
        places[1], [1.5 / UNITS[0], *(coords[1, [1, 0]] / UNITS[1])], rtol=1e-6
    )
    np.testing.assert_allclose(places[3], [1, 1, 1])  # the order of text
    np.testing.assert_array_equal(
        rotary_places(text(3).metadata)[0], np.repeat(np.arange(3.0)[:, None], 3, 1)
    )
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 12))
    rates = rotary_rates(12, 100.0, {})
    alike = jnp.repeat(both.position.astype(jnp.float32)[..., None], 3, -1)
    np.testing.assert_allclose(
        rotate(x, alike, rates), rotate(x, both.position, rates), rtol=1e-5, atol=1e-6
    )
    # Scores depend on differences of places alone.
    moved = rotary_places(both) + jnp.array([3.0, 5.0, 7.0])
    scores = [
        jnp.einsum("bqha,bkha->bqkh", *[rotate(x, each, rates)] * 2)
        for each in (rotary_places(both), moved)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("places", "fusion"), [("sines", "early"), ("fourier", "gated_cross_attention")]
)
def test_one_map_places_all_modalities(places, fusion):
    task = tiny.task(
        model__places=places,
        model__fusion=fusion,
        objectives__matching__weight=0.0,
        model__rotary_base=100.0,
        model__rotary_axes="places",
    )
    params, batch = tiny.params(task), tiny.batch(task)
    assert ("places" in params) == (places == "fourier")

    def added_to_images(model):
        plain = model.embedders["image"](batch["image"]).embeddings
        return model.embed_items("image", batch["image"]).embeddings - plain

    run = jax.jit(lambda p: task.model.apply({"params": p}, method=added_to_images))
    added = np.asarray(run(params))
    assert added.std() > 0.05 and np.abs(added[0] - added[1]).max() < 1e-5
    assert np.abs(added[0, 0] - added[0, 1]).max() > 1e-2
    loss = jax.jit(lambda p: task.metrics(p, batch, jax.random.key(0), deterministic=True))
    assert all(np.isfinite(value).all() for value in loss(params)["captioning/loss"])
