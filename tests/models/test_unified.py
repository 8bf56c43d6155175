"""The model against itself on other paths, and its layers against NumPy written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.modalities.image import patchify, resize_positions
from unified_mm.models.unified import text_group
from unified_mm.nn.attention.attention import Attention, plan_attention
from unified_mm.nn.attention.rules import CAUSAL, RULES, TEXT, MaskTable, View
from unified_mm.nn.feed_forward import Mlp
from unified_mm.nn.layers import Norm
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.objectives.captioning import score_text
from unified_mm.parallel.sharding import path_of, without_names

KEY = jax.random.key(0)
LENGTH = 12
# Rules by which a text can be written: no token sees the one it predicts, however roundabout.
WRITING = [name for name in RULES if name != "joint"]


@pytest.fixture(scope="module")
def task():
    return tiny.task()


@pytest.fixture(scope="module")
def params(task):
    return tiny.params(task)


def ragged(task, size=3):
    """Texts of different lengths, one of them absent, and one image absent."""
    batch = tiny.batch(task, size, seed=2)
    batch["image"]["present"] = batch["image"]["present"].at[1].set(False)
    batch["text"]["present"] = batch["text"]["present"].at[2].set(False)
    return batch


def test_joint_is_the_only_rule_that_cannot_write():
    for name in RULES:
        if name in WRITING:
            view = View("t", name, autoregressive=True)
            assert view.resolved.between(TEXT, TEXT, (True, True)) == (CAUSAL, None)
        else:
            with pytest.raises(ValueError, match="would see the one it must predict"):
                View("t", name, autoregressive=True)


@pytest.mark.parametrize("rule", WRITING)
def test_text_read_in_pieces_on_the_cache_equals_one_full_pass(task, params, rule):
    batch = ragged(task)
    view = View("t", rule, autoregressive=True)

    def both(model):
        whole = model.encode(batch, (view,))["t"].text
        cache = model.read_context(batch, view).cache.reserve(text_group(view, LENGTH))
        parts, start = [], 0
        for stop in (1, 2, 7, LENGTH):
            text = {name: batch["text"][name][:, start:stop] for name in ("ids", "valid")}
            text["present"] = batch["text"]["present"]
            text["text_position"] = jnp.broadcast_to(jnp.arange(start, stop), text["ids"].shape)
            x, cache = model.extend(cache, text, view)
            parts.append(x)
            start = stop
        return whole, jnp.concatenate(parts, axis=1), cache.length

    whole, pieces, length = jax.jit(lambda p: task.model.apply({"params": p}, method=both))(params)
    valid = np.asarray(batch["text"]["valid"] & batch["text"]["present"][:, None])
    assert length == 4 + LENGTH and valid.any()
    np.testing.assert_allclose(np.asarray(pieces)[valid], np.asarray(whole)[valid], atol=2e-5)


def test_a_shared_pass_equals_a_pass_for_each(task, params):
    batch = ragged(task)
    views = (
        View("contrastive", "separate"),
        View("captioning", "prefix", autoregressive=True),
        View("alone", "causal", autoregressive=True),
        View("joint", "joint"),
    )

    def both(model):
        together = model.encode(batch, views)
        apart = {s.name: model.encode(batch, (s,))[s.name] for s in views}
        cut = {"together": together, "apart": apart}
        return {
            how: {
                name: (e.text, e.outputs["image"], e.cache.layers["block_0"][0])
                for name, e in each.items()
            }
            for how, each in cut.items()
        }

    outputs = jax.jit(lambda p: task.model.apply({"params": p}, method=both))(params)
    text_there = np.asarray(batch["text"]["valid"] & batch["text"]["present"][:, None])
    image_there = np.asarray(batch["image"]["present"])
    for view in views:
        text, image, keys = map(np.asarray, outputs["together"][view.name])
        text2, image2, keys2 = map(np.asarray, outputs["apart"][view.name])
        np.testing.assert_allclose(text[text_there], text2[text_there], atol=2e-5)
        np.testing.assert_allclose(image[image_there], image2[image_there], atol=2e-5)
        np.testing.assert_allclose(keys[:, image_there], keys2[:, image_there], atol=2e-5)


def written_loss(task, batch):
    """Captioning's loss and its gradient, compiled."""
    view = View("captioning", "prefix", autoregressive=True)

    def loss(params):
        def run(model):
            x = model.encode(batch, (view,))["captioning"].text
            return score_text(model.logits, x, batch["text"])

        likelihood, _, scored = task.model.apply({"params": params}, method=run)
        return jnp.where(scored, likelihood, 0.0).sum()

    return jax.jit(jax.value_and_grad(loss))


def test_unrolled_and_rematerialised_change_nothing(task, params):
    batch = ragged(task)
    value, gradient = written_loss(task, batch)(params)
    other = tiny.task(model__unroll=2, model__remat="full")
    assert shapes_of(other) == shapes_of(task)
    value2, gradient2 = written_loss(other, batch)(params)
    np.testing.assert_allclose(value, value2, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def shapes_of(task):
    boxed = jax.eval_shape(task.init, KEY)
    return jax.tree.map(lambda x: (x.shape, x.dtype), without_names(boxed))


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_a_copy_for_each_modality_of_the_same_weights_is_the_shared_model(task, params, part):
    other = tiny.task(**{f"model__separate_{part}": True})
    shared = leaves(params)
    separate = jax.eval_shape(lambda: without_names(other.init(KEY)))
    copied = 0

    def take(path, leaf):
        nonlocal copied
        name = path_of(path)
        for modality in ("image", "text"):
            if f"{part}/" in name and f"/{modality}/" in name:
                copied += 1
                name = name.replace(f"/{modality}/", "/shared/")
        assert shared[name].shape == leaf.shape
        return shared[name]

    copies = jax.tree_util.tree_map_with_path(take, separate)
    maps = {"attention": 4, "feed_forward": 2}[part]
    assert copied == 2 * 2 * maps  # modalities x (kernel, bias) x maps
    assert len(leaves(copies)) == len(shared) + copied // 2
    batch = ragged(task)
    view = View("t", "joint")

    def read(task):
        return jax.jit(
            lambda p: task.model.apply({"params": p}, batch, (view,), method="encode")["t"].text
        )

    same = read(task)(params)
    np.testing.assert_allclose(read(other)(copies), same, atol=1e-5)
    # Each modality's copy is its own: changed for the image alone, the separate text stays.
    where = f"/{part}/"
    changed = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1.5 if where in path_of(path) and "/image/" in path_of(path) else x,
        copies,
    )
    assert np.abs(read(other)(changed) - same).max() > 1e-3

    @jax.jit
    def alone(params):
        return other.model.apply(
            {"params": params}, batch["text"], View("t", "separate"), method="read_text"
        )

    np.testing.assert_array_equal(alone(changed), alone(copies))


def leaves(tree):
    return {path_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_picture_of_another_size_gets_interpolated_positions(task, params):
    batch = tiny.batch(task, 2)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (2, 32, 24, 3)).astype(np.float32)
    large = {**batch, "image": {"pixels": jnp.asarray(pixels), "present": jnp.ones(2, bool)}}
    view = View("t", "prefix", autoregressive=True)
    encode = jax.jit(
        lambda p: task.model.apply({"params": p}, large, (view,), method="encode")["t"]
    )
    read = encode(params)
    assert read.outputs["image"].shape == (2, 4 * 3, 16) and np.isfinite(read.text).all()

    embedder = params["embedders_image"]
    module = task.modalities["image"].embedder(16, jnp.float32)
    tokens = module.apply({"params": embedder}, large["image"]).embeddings
    table = np.asarray(embedder["positions"])
    flat = np.asarray(patches_by_loops(pixels, 8)) / 127.5 - 1
    expected = flat @ np.asarray(embedder["patches"]["kernel"]) + embedder["patches"]["bias"]
    expected += np.asarray(bilinear(table, 4, 3)).reshape(12, 16) + embedder["modality"]
    np.testing.assert_allclose(tokens, expected, atol=1e-4)


def bilinear(table, down, across):
    """Half-pixel centres, edges held: what image libraries call bilinear enlargement."""

    def weights(size, wanted):
        matrix = np.zeros((wanted, size))
        for i in range(wanted):
            place = (i + 0.5) * size / wanted - 0.5
            low = math.floor(place)
            for j, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
                matrix[i, min(max(j, 0), size - 1)] += weight
        return matrix

    rows, columns = weights(table.shape[0], down), weights(table.shape[1], across)
    return np.einsum("ir,rcd,jc->ijd", rows, table, columns)


def patches_by_loops(pixels, patch):
    rows = []
    for picture in pixels:
        rows.append(
            [
                picture[y : y + patch, x : x + patch].reshape(-1)
                for y in range(0, picture.shape[0], patch)
                for x in range(0, picture.shape[1], patch)
            ]
        )
    return np.array(rows)


def test_patches_are_cut_row_by_row():
    pixels = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    found = patchify(jnp.asarray(pixels), 2)
    assert found.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(found.reshape(2, 6, 12), patches_by_loops(pixels, 2))
    with pytest.raises(ValueError, match="4x6 pixels is not cut evenly by 4"):
        patchify(jnp.asarray(pixels), 4)
    table = jnp.ones((2, 3, 4))
    assert resize_positions(table, (2, 3)) is table


def test_attention_is_softmax_of_scaled_products_written_out():
    rng = np.random.default_rng(1)
    groups = (Group("image", "image", 3), Group("t", "text", 4))
    x = rng.normal(size=(2, 7, 8)).astype(np.float32)
    valid = jnp.asarray(rng.random((2, 7)) < 0.8).at[:, 0].set(True).at[:, 3].set(True)
    metadata = single_document(valid, Group("all", "text", 7)).replace(groups=groups)
    view = View("t", "prefix", autoregressive=True)
    options = TransformerOptions(8, 1, 2, 8)
    plan = plan_attention(options, MaskTable((view,)), metadata, metadata, keep=(0, 3))
    module = Attention(options)
    params = without_names(module.init(KEY, jnp.asarray(x), plan, None))["params"]
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape, scale=0.4), p.dtype), params
    )
    found, (keys, values) = module.apply({"params": params}, jnp.asarray(x), plan, None)

    def project(name):
        p = params[name]["shared"]
        return np.einsum("bnd,dha->bnha", x, p["kernel"]) + np.asarray(p["bias"])

    query, key, value = project("query"), project("key"), project("value")
    # A cache has the heads first.
    np.testing.assert_allclose(keys, key[:, :3].swapaxes(1, 2), atol=1e-5)
    np.testing.assert_allclose(values, value[:, :3].swapaxes(1, 2), atol=1e-5)
    out = params["output"]["shared"]
    for b in range(2):
        for q in range(7):
            seen = [k for k in range(7) if valid[b, k] and (k < 3 if q < 3 else k <= q)]
            heads = []
            for h in range(2):
                scores = np.array([query[b, q, h] @ key[b, k, h] for k in seen]) / math.sqrt(4)
                weights = np.exp(scores - scores.max())
                heads.append((weights / weights.sum()) @ value[b, seen, h])
            expected = np.einsum("ha,had->d", np.array(heads), out["kernel"]) + out["bias"]
            np.testing.assert_allclose(found[b, q], expected, atol=1e-5)


def test_layer_norm_and_mlp_written_out():
    rng = np.random.default_rng(2)
    x = rng.normal(3.0, 2.0, (2, 5, 8)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    found = Norm().apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(found, expected, atol=1e-5)

    up, down = rng.normal(size=(8, 6)), rng.normal(size=(6, 8))
    a, b = rng.normal(size=6), rng.normal(size=8)
    as_params = {"up": {"kernel": up, "bias": a}, "down": {"kernel": down, "bias": b}}
    options = TransformerOptions(x.shape[-1], 1, 1, 6)
    found = Mlp(options).apply({"params": jax.tree.map(np.float32, as_params)}, jnp.asarray(x))
    hidden = x @ up + a
    # The tanh form of GELU (Hendrycks & Gimpel 2016).
    hidden *= 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(found, hidden @ down + b, rtol=1e-4, atol=1e-4)


def test_low_precision_keeps_parameters_and_logits_float32():
    task = tiny.task(model__dtype="bfloat16")
    shapes = without_names(jax.eval_shape(task.init, KEY))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    view = View("t", "prefix", autoregressive=True)

    def read(model, batch):
        x = model.encode(batch, (view,))["t"].text
        return x, model.logits(x)

    x, logits = jax.eval_shape(
        lambda p, b: task.model.apply({"params": p}, b, method=read), shapes, tiny.batch(task, 2)
    )
    assert x.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
