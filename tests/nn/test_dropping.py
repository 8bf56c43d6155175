"""Dropped patches: the least important end after a layer, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.analysis.attention_maps import attention_over_patches
from unified_mm.analysis.layer_features import image_features
from unified_mm.nn.attention.rules import View
from unified_mm.nn.dropping import distinctness, kept_of, most_important
from unified_mm.nn.options import DroppingOptions
from unified_mm.nn.tokens import Group, join_metadata, offset_positions, single_document
from unified_mm.serving.limits import Limits
from unified_mm.serving.service import Service, missing
from unified_mm.serving.starting import warm_up
from unified_mm.serving.worker import Worker
from unified_mm.training.sizes import forward_flops

VIEW = View("captioning", "prefix", autoregressive=True)
PATCHES = 16  # of a picture of 32 pixels
ALMOST = 0.99  # all go on, on the way of those that are dropped


DEEP = {"data__image_size": 32, "model__rotary_base": 100.0, "model__layers": 3}


def task(keep, **changes):
    return tiny.task(**DEEP, model__dropping__keep=keep, **changes)


@pytest.fixture(scope="module")
def half():
    built = task(0.5)
    return built, tiny.params(built), tiny.batch(built, 3)


def losses(task, params, batch):
    """The losses of all objectives and their gradients."""

    def total(params):
        found = task.metrics(params, batch, jax.random.key(0), deterministic=True)
        parts = {name: x for name, (x, _) in found.items() if name.endswith("loss")}
        return sum(jnp.sum(x) for x in parts.values()), parts

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


def read(task, params, batch, what):
    """What a function of the model and a batch gives."""

    def run(params, batch):
        return task.model.apply({"params": params}, batch, method=what)

    return jax.jit(run)(params, batch)


def outputs(model, batch):
    found = model.encode(batch, (VIEW,))["captioning"]
    return found.text, found.outputs["image"], found.cache.metadata.position[:, :8]


def test_with_room_for_all_it_is_the_dense_model(half):
    """Losses and gradients; of the scorer alone the dense model has none."""
    _, params, batch = half
    params = {name: each for name, each in params.items() if name != "heads_matching"}
    plain = {"objectives__matching__weight": 0.0}
    (_, parts), gradients = losses(task(ALMOST, **plain), params, batch)
    assert kept_of(PATCHES, ALMOST) == PATCHES
    dense = {name: each for name, each in params.items() if name != "scorer"}
    (_, expected), expected_gradients = losses(task(1.0, **plain), dense, batch)
    for name, each in expected.items():
        np.testing.assert_allclose(parts[name], each, rtol=1e-6, atol=1e-6)
    scorer = gradients.pop("scorer")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        gradients,
        expected_gradients,
    )
    assert np.abs(scorer["score"]["kernel"]).max() > 1e-5


def test_the_scorer_learns_where_some_are_dropped(half):
    (_, parts), gradients = losses(*half)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((parts, gradients)))
    assert np.abs(gradients["scorer"]["score"]["kernel"]).max() > 1e-5


def test_the_best_go_on_in_order():
    image, sound = Group("image", "image", 5), Group("sound", "sound", 3)
    valid = jnp.array([[1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0]], bool)
    metadata = join_metadata(
        [
            single_document(valid[:, :5], image),
            offset_positions(single_document(valid[:, 5:], sound), {}, 5),
        ]
    )
    scores = jnp.array([[3.0, 1, 5, 1, 4, 0, 9, 1]] * 2)
    slots, kept = most_important(scores, metadata, 0.5)
    assert slots.tolist() == [[0, 2, 4, 5, 7], [2, 8, 8, 8, 8]]
    assert kept.valid.tolist() == [[True] * 5, [True, False, False, False, False]]
    assert kept.position[0].tolist() == [0, 2, 4, 5, 7]
    assert [(g.name, g.length, g.places) for g in kept.groups] == [
        ("image", 3, 5), ("sound", 2, 3),
    ]  # fmt: skip


def test_what_is_unlike_the_rest_of_its_group_is_distinct():
    groups = (Group("image", "image", 4), Group("sound", "sound", 2))
    valid = jnp.array([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    parts = single_document(valid[:, :4], groups[0]), single_document(valid[:, 4:], groups[1])
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    x[1, 2] = 5.0
    found = distinctness(jnp.asarray(x), join_metadata(parts))
    for row, span in ((0, slice(0, 4)), (0, slice(4, 6)), (1, slice(0, 4))):
        mean = x[row, span][np.asarray(valid)[row, span]].mean(0)
        expected = np.square(x[row, span] - mean).mean(-1)
        np.testing.assert_allclose(found[row, span], expected, rtol=1e-5)
    assert found[1, :4].argmax() == 2 and np.isfinite(found).all()


def test_the_distinct_patch_of_an_even_picture_goes_on():
    """There is nothing to learn for it, and nothing is learned by it."""
    built = task(0.1, model__dropping__by="distinct")
    params, batch = tiny.params(built), tiny.batch(built, 2)
    assert "scorer" not in params
    pixels = np.full_like(batch["image"]["pixels"], 128)
    corner = (slice(8, 16), slice(16, 24))  # of 4 x 4 patches the one in row 1, column 2
    pixels[0][corner], pixels[1][:8, :8] = 255, 0
    drawn = {**batch, "image": {**batch["image"], "pixels": pixels, "present": np.ones(2, bool)}}
    position = read(built, params, drawn, outputs)[2]
    assert 1 * 4 + 2 in position[0, :2] and 0 in position[1, :2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(losses(built, params, batch)))


@pytest.fixture(scope="module")
def read_half(half):
    """What gives the outputs of half of the patches, compiled."""
    built, params, _ = half
    return jax.jit(lambda batch: built.model.apply({"params": params}, batch, method=outputs))


def test_no_other_example_changes_and_order_does_not_matter(half, read_half):
    _, _, batch = half
    found = read_half(batch)
    assert found[1].shape[1] == PATCHES // 2
    other = jax.tree.map(lambda x: x, batch)
    other["image"]["pixels"] = batch["image"]["pixels"].at[1].mul(0.3)
    for x, y in zip(found, read_half(other), strict=True):
        np.testing.assert_array_equal(np.delete(x, 1, 0), np.delete(y, 1, 0))
    assert not np.array_equal(found[0][1], read_half(other)[0][1])
    turned = jax.tree.map(lambda x: x[::-1], batch)
    for x, y in zip(found, read_half(turned), strict=True):
        np.testing.assert_allclose(x, y[::-1], atol=1e-6)


def test_no_token_tells_of_a_later_one(half, read_half):
    """By perturbation: a choice has no gradient."""
    _, _, batch = half
    found = read_half(batch)
    for place in (3, 7):
        other = jax.tree.map(lambda x: x, batch)
        other["text"]["ids"] = batch["text"]["ids"].at[:, place:].set(5)
        text, image, chosen = read_half(other)
        np.testing.assert_array_equal(text[:, :place], found[0][:, :place])
        assert not np.array_equal(text[:, place], found[0][:, place])
        np.testing.assert_array_equal(image, found[1])
        np.testing.assert_array_equal(chosen, found[2])


def test_what_is_dropped_is_not_read_after_the_layer(half):
    """Patches that end early reach the text only through those that go on."""
    built, params, batch = half
    first = tiny.replace_model(built, dropping=DroppingOptions(0.5, 1))
    none = jax.tree.map(jnp.zeros_like, params["transformer"]["layers"]["block_0"]["attention"])
    blind = jax.tree.map(lambda x: x, params)
    blind["transformer"]["layers"]["block_0"]["attention"] = jax.tree.map(
        lambda x, y: x.at[:1].set(y[:1]),
        params["transformer"]["layers"]["block_0"]["attention"],
        none,
    )
    read = jax.jit(lambda batch: first.model.apply({"params": blind}, batch, method=outputs))
    text, _, chosen = read(batch)
    patch = next(n for n in range(PATCHES) if n not in chosen[0].tolist())
    row, column = 8 * (patch // 4), 8 * (patch % 4)
    other = jax.tree.map(lambda x: x, batch)
    pixels = batch["image"]["pixels"]
    other["image"]["pixels"] = pixels.at[0, row : row + 8, column : column + 8].mul(0.99)
    again, _, same = read(other)
    np.testing.assert_array_equal(same, chosen)
    np.testing.assert_array_equal(again, text)


@pytest.mark.parametrize("unstacked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_text_written_on_beside_a_cache_is_the_text_read_at_once(half, unstacked):
    built, params, batch = half
    text = {key: batch["text"][key] for key in ("ids", "valid", "present")}
    text["valid"] = jnp.ones_like(text["valid"])
    if unstacked:
        from unified_mm.nn.unstack import unstack_layers

        built = tiny.replace_model(built, unstacked=True)
        params = unstack_layers(params)

    def part(start, stop):
        cut = {key: text[key][:, start:stop] for key in ("ids", "valid")}
        place = jnp.broadcast_to(jnp.arange(start, stop), cut["ids"].shape)
        return {**cut, "present": text["present"], "text_position": place}

    def run(model, batch):
        whole = model.encode({**batch, "text": text}, (VIEW,))["captioning"].text
        first, cache = model.prefill({**batch, "text": part(0, 5)}, VIEW, 7)
        assert cache.slots == PATCHES // 2 + 12
        second, _ = model.extend(cache, part(5, 12), VIEW)
        prefix = model.prefix(batch, VIEW).reserve(Group("captioning", "text", 12))
        third, _ = model.extend(prefix, part(0, 12), VIEW)
        return whole, jnp.concatenate([first, second], axis=1), third

    whole, *others = read(built, params, batch, run)
    for each in others:
        np.testing.assert_allclose(whole, each, atol=2e-5)


def test_counted_flops_fall_with_the_share():
    def flops(keep):
        built = task(keep, objectives__matching__weight=0.0)
        return forward_flops(built, built.abstract_params())

    dense, almost, some = (flops(keep) for keep in (1.0, ALMOST, 0.25))
    # Products of 8 examples, 2 layers, 12 of 16 patches: their maps, width 16 and 32 within, their
    # scores, and in 3 layers those of a text; the scorer adds one column.
    scorer = 2 * 16 * PATCHES
    maps, own, read = 2 * 12 * 4096, 2 * 64 * (16**2 - 4**2), 3 * 64 * 12 * 12
    assert dense - some == 8 * (maps + own + read - scorer)
    assert almost - dense == 8 * scorer


def test_a_loaded_model_says_that_its_layers_cannot_be_shown(monkeypatch):
    """And is warmed up for serving without them."""
    model = tiny.loaded(**DEEP, model__dropping__keep=0.5)
    picture = np.zeros((32, 32, 3), np.uint8)
    for show in (
        lambda: image_features(model, [picture]),
        lambda: attention_over_patches(model, picture, "", "a red square"),
    ):
        with pytest.raises(ValueError, match=r"of a stack that drops tokens .* cannot be shown"):
            show()
    without = missing(model, None)
    assert "/caption" not in without and "drops patches" in without["/attention"]
    monkeypatch.setattr(Service, "begin", lambda *_: ["red"])
    with Worker(1) as worker:
        service = Service(model, worker, Limits(), attend=attention_over_patches)
        service.missing["/embed"] = "left out here, to compile less"
        assert warm_up(service) > 0
        service.close()


def test_the_share_is_rounded_up_but_for_a_products_rounding():
    asked = ((100, 0.07), (100, 0.071), (10, 0.5), (3, 0.1))
    assert [kept_of(*each) for each in asked] == [7, 8, 5, 1]


def test_what_cannot_be_is_refused():
    def why(keep=0.5, **changes):
        with pytest.raises(ValueError, match="model.dropping") as caught:
            built = task(keep, **changes)
            built.abstract_params()
        return str(caught.value)

    assert "a share is at most 1" in why(1.5)
    assert "after=3: must be a multiple of 1 below model.layers=3" in why(model__dropping__after=3)
    assert "tokens of image are read in order" in why(objectives__captioning__rule="causal")
    assert "the context sees the text" in why(objectives__matching__rule="joint")
    experts = {"model__feed_forward_type": "experts"}
    assert "of all tokens; set model.feed_forward_type='dense'" in why(**experts)
    grid = {"model__sparse": {"image": {"grid": 1}}}
    assert "what is left of image is no grid of patches" in why(**grid)
    pool = {"objectives__contrastive__pool": "first"}
    assert "objectives.contrastive.pool='first' may be dropped" in why(**pool)
    exits = {"model__exits": (1,), "objectives__exits__weight": 1.0}
    assert "nothing for the losses of exits; set model.exits=()" in why(**exits)
    built = task(0.5)
    late = {"model__fusion": "late", "objectives__captioning__weight": 0.0}
    late |= {"objectives__matching__weight": 0.0}
    assert "only the early fusions drop tokens of the context, and not model.fusion='late'" in why(
        **late
    )
    documents = tiny.documents(built)
    with pytest.raises(ValueError, match="image is placed by the data"):
        jax.eval_shape(lambda p: read(built, p, documents, outputs), tiny.params(built))
    with pytest.raises(ValueError, match="the attention of a stack that drops tokens"):
        batch = tiny.batch(built)
        built.model.apply(
            {"params": tiny.params(built)}, batch, method=outputs, mutable=["attention"]
        )
