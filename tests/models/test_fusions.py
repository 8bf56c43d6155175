"""Gated cross-attention and two towers: formulas written out, sight by autodiff, the cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.cross_attention import GatedCrossLayer
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import GateOptions, TransformerOptions
from unified_mm.nn.resampler import PerceiverResampler, ResamplerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.parallel.sharding import without_names

GATED = {
    "model__fusion": "gated_cross_attention",
    "model__resampler__latents": 3,
    "model__resampler__layers": 1,
    "model__resampler__heads": 2,
    "model__resampler__head_width": 4,
    "model__resampler__feed_forward": 8,
    "model__modalities__text__max_positions": 24,
    "objectives__matching__weight": 0.0,
}
EARLY = {"model__modalities__text__max_positions": 24, "objectives__matching__weight": 0.0}
FUSIONS = {"early": EARLY, "gated_cross_attention": GATED}


def built(fusion, rule="interleaved_latest", **more):
    task = tiny.task(**FUSIONS[fusion], objectives__captioning__rule=rule, **more)
    return task, tiny.params(task)


def numbers(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.5, size=x.shape), x.dtype), tree)


def layer_norm(x, p, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(query, key, value, seen):
    """One example, heads by loops: query [Q, H, A]; `seen` [Q, K]; nothing seen gives zero."""
    out = np.zeros_like(query)
    for q in range(query.shape[0]):
        keys = np.flatnonzero(seen[q])
        for h in range(query.shape[1]):
            if len(keys):
                scores = np.array([query[q, h] @ key[k, h] for k in keys])
                weights = np.exp(scores / math.sqrt(query.shape[2]))
                out[q, h] = (weights / weights.sum()) @ value[keys, h]
    return out


@pytest.mark.parametrize(("gate", "shape"), [("tanh", "scalar"), ("sigmoid", "channel")])
def test_a_gated_layer_written_out(gate, shape):
    """OpenFlamingo's gated block, but what sees no image gets zero from the attention."""
    options = TransformerOptions(
        8, 1, 2, 12, activation="gelu_exact", cross=GateOptions(1, gate, shape, 0.5)
    )
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    features = rng.normal(size=(2, 4, 6)).astype(np.float32)
    queries = single_document(jnp.ones((2, 5), bool), Group("t", "text", 5))
    segment = np.array([[0, 1, 1, 2, 2], [1, 1, 1, 2, 3]])
    queries = queries.replace(segment=jnp.asarray(segment))
    kept = single_document(jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 1]], bool), Group("i", "image", 4))
    kept = kept.replace(segment=jnp.asarray([[1, 1, 2, 2], [1, 1, 2, 2]]))
    view = View("t", "interleaved_latest", autoregressive=True)
    plan = plan_attention(
        options, MaskTable((view,)), queries, kept, features=jnp.asarray(features)
    )
    layer = GatedCrossLayer(options)
    x_ = jnp.asarray(x)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x_, plan, None))
    params = numbers(without_names(shapes))
    apply = jax.jit(lambda params, cached: layer.apply(params, x_, plan, cached))
    found, (keys, values) = apply(params, None)
    again, _ = apply(params, (keys, values))
    np.testing.assert_array_equal(found, again)

    p = jax.tree.map(np.asarray, params["params"])
    g = np.tanh if gate == "tanh" else lambda a: 1 / (1 + np.exp(-a))
    normed = layer_norm(x, p["attention_norm"], 1e-6)
    query = np.einsum("bnd,dha->bnha", normed, p["attention"]["query"]["kernel"])
    key = np.einsum("bnd,dha->bnha", features, p["attention"]["key"]["kernel"])
    value = np.einsum("bnd,dha->bnha", features, p["attention"]["value"]["kernel"])
    valid = np.asarray(kept.valid)
    seen = (segment[:, :, None] == np.asarray(kept.segment)[:, None]) & valid[:, None]
    assert not seen[0, 0].any() and not seen[1, 4].any()
    attended = np.stack([attention(*each) for each in zip(query, key, value, seen, strict=True)])
    out = np.einsum("bnha,had->bnd", attended, p["attention"]["output"]["kernel"])
    assert (out[0, 0] == 0).all() and (out[1, 4] == 0).all()
    y = x + g(p["attention_gate"]) * out
    hidden = gelu(layer_norm(y, p["feed_forward_norm"], 1e-6) @ p["feed_forward"]["up"]["kernel"])
    y = y + g(p["feed_forward_gate"]) * (hidden @ p["feed_forward"]["down"]["kernel"])
    np.testing.assert_allclose(found, y, atol=2e-5)


def test_the_resampler_written_out():
    """Flamingo's appendix A.1.1, with frames, on features some of which are not there."""
    blocks = TransformerOptions(
        6, 2, 2, 10, head_width=4, activation="gelu_exact", norm_epsilon=1e-5,
        feed_forward_bias=False,
    )  # fmt: skip
    options = ResamplerOptions(3, 4, blocks)
    rng = np.random.default_rng(2)
    features = rng.normal(size=(2, 2, 5, 6)).astype(np.float32)
    valid = rng.random((2, 2, 5)) < 0.7
    module = PerceiverResampler(options)
    apply = jax.jit(module.apply)
    shapes = jax.eval_shape(module.init, jax.random.key(0), features, valid)
    params = numbers(without_names(shapes))
    found = apply(params, features, valid)
    poisoned = np.where(valid[..., None], features, np.float32(1e3))
    np.testing.assert_array_equal(found, apply(params, poisoned, valid))

    p = jax.tree.map(np.asarray, params["params"])
    for b in range(2):
        x = (features[b] + p["times"][:2, None]).reshape(10, 6)
        latents = p["latents"]
        for layer in range(2):
            a = p[f"attention_{layer}"]
            normed = layer_norm(latents, a["latents_norm"], 1e-5)
            both = np.concatenate([layer_norm(x, a["features_norm"], 1e-5), normed])
            query = np.einsum("nd,dha->nha", normed, a["query"]["kernel"])
            key = np.einsum("nd,dha->nha", both, a["key"]["kernel"])
            value = np.einsum("nd,dha->nha", both, a["value"]["kernel"])
            seen = np.broadcast_to(np.append(valid[b].reshape(-1), [True] * 3), (3, 13))
            out = attention(query, key, value, seen)
            latents = latents + np.einsum("nha,had->nd", out, a["output"]["kernel"])
            f = p[f"feed_forward_{layer}"]
            hidden = layer_norm(latents, p[f"feed_forward_norm_{layer}"], 1e-5)
            latents = latents + gelu(hidden @ f["up"]["kernel"]) @ f["down"]["kernel"]
        np.testing.assert_allclose(found[b], layer_norm(latents, p["norm"], 1e-5), atol=2e-5)
    with pytest.raises(ValueError, match="9 frames, but model.resampler.frames=4"):
        module.init(jax.random.key(0), jnp.zeros((1, 9, 5, 6)), jnp.ones((1, 9, 5), bool))


def test_a_fresh_gate_lets_nothing_through_bit_for_bit():
    task, params = built("gated_cross_attention")
    cross = params["transformer"]["layers"]["cross"]
    for gate in ("attention_gate", "feed_forward_gate"):
        cross[gate] = jnp.full_like(cross[gate], task.model.options.cross.start)
    view = View("captioning", "interleaved_latest", autoregressive=True)

    @jax.jit
    def logits(params, batch):
        def read(model):
            return model.logits(model.encode(batch, (view,))["captioning"].text)

        return task.model.apply({"params": params}, method=read)

    one, other = tiny.batch(task, 2, seed=0), tiny.batch(task, 2, seed=1)
    other["text"] = one["text"]
    assert (one["image"]["pixels"] != other["image"]["pixels"]).any()
    np.testing.assert_array_equal(logits(params, one), logits(params, other))
    cross["attention_gate"] = cross["attention_gate"] + 0.1
    assert (np.asarray(logits(params, one)) != np.asarray(logits(params, other))).any()


def sees(rule, query, key, query_is_text, key_is_text):
    """BlockMask in words; each is (document, position, segment)."""
    if query[0] != key[0]:
        return False
    if not query_is_text and not key_is_text:
        return key[1] <= query[1] or key[2] == query[2]
    if query_is_text and not key_is_text and rule == "interleaved_latest":
        return key[2] == query[2]
    return key[1] <= query[1]


def reached(direct):
    """What reaches what through any number of layers."""
    whole = direct.copy()
    for _ in range(len(direct)):
        whole = whole | (whole @ direct > 0)
    return whole


@pytest.mark.parametrize(
    ("fusion", "rule", "remat"),
    [
        ("early", "interleaved_latest", "full"),
        pytest.param("gated_cross_attention", "interleaved", "full", marks=pytest.mark.slow),
        ("gated_cross_attention", "interleaved_latest", "none"),
    ],
)
def test_sight_in_packed_documents(fusion, rule, remat):
    """d logits / d pixels and d logits / d token embeddings: zero where sight is forbidden."""
    task, params = built(fusion, rule, model__remat=remat)
    batch = tiny.documents(task)
    view = View("captioning", rule, autoregressive=True)
    text, image = batch["text"], batch["image"]
    scored = jax.random.normal(jax.random.key(5), (task.modalities["text"].vocabulary,))
    table = params["embedders_text"]["positions"]

    def outputs(pixels, nudge):
        # Each token is nudged by a position embedding of its own.
        places = jnp.arange(nudge.shape[0] * nudge.shape[1]).reshape(nudge.shape[:2])
        rows = jnp.concatenate([(table[text["text_position"]] + nudge).reshape(-1, table.shape[1])])
        changed = {**params, "embedders_text": {**params["embedders_text"], "positions": rows}}
        both = {
            "image": {**image, "pixels": pixels},
            "text": {**text, "text_position": places},
        }

        def read(model):
            return model.logits(model.encode(both, (view,))["captioning"].text) @ scored

        return wide.model.apply({"params": changed}, method=read)

    wide = tiny.task(
        **{**FUSIONS[fusion], "model__modalities__text__max_positions": text["ids"].size},
        objectives__captioning__rule=rule,
        model__remat=remat,
    )
    nudge = jnp.zeros((*text["ids"].shape, table.shape[1]))
    by_pixels, by_tokens = jax.jit(jax.jacrev(outputs, (0, 1)))(image["pixels"], nudge)
    by_pixels = np.abs(np.asarray(by_pixels)).sum((4, 5, 6))  # [b, q, b', slot]
    by_tokens = np.abs(np.asarray(by_tokens)).sum(-1)  # [b, q, b', k]
    where = {
        name: np.stack([arrays[k] for k in ("document", "position", "segment")], -1)
        for name, arrays in (("text", text), ("image", image))
    }
    for b in range(2):
        tokens = [tuple(where["text"][b, t]) for t in range(text["ids"].shape[1])]
        images = [tuple(where["image"][b, s]) for s in range(3)]
        kinds = [(t, True) for t in tokens] + [(i, False) for i in images]
        there = np.append(text["valid"][b], image["present"][b])
        direct = np.array(
            [
                [
                    sees(rule, q, k, q_text, k_text)
                    # The context of gated cross-attention sees nothing but itself.
                    and (fusion == "early" or q_text or q == k)
                    for k, k_text in kinds
                ]
                for q, q_text in kinds
            ]
        )
        allowed = reached((direct & there[None] & there[:, None]).astype(int)) > 0
        for q in np.flatnonzero(text["valid"][b]):
            for other in range(2):
                for s in range(3):
                    expected = b == other and allowed[q, len(tokens) + s]
                    assert (by_pixels[b, q, other, s] > 0) == expected, ("image", b, q, other, s)
                for k in range(len(tokens)):
                    expected = b == other and allowed[q, k]
                    assert (by_tokens[b, q, other, k] > 0) == expected, ("text", b, q, other, k)
    assert by_pixels.any()


@pytest.mark.parametrize("fusion", ["early", "gated_cross_attention", "late"])
def test_text_alone_is_read_as_beside_an_image_it_does_not_see(fusion):
    changes = FUSIONS.get(fusion, {"model__fusion": "late", "objectives__captioning__weight": 0.0})
    task = tiny.task(**{**changes, "objectives__matching__weight": 0.0})
    params = tiny.params(task)
    batch = tiny.batch(task, 3)
    view = View("contrastive", "separate")

    def run(model):
        beside = model.encode(batch, (view,))
        return beside, model.read_text(batch["text"], view), model.read_context(batch, view)

    read = jax.jit(lambda params: task.model.apply({"params": params}, method=run))
    beside, alone, image = read(params)
    there = np.asarray(batch["text"]["valid"])
    found = beside["contrastive"]
    np.testing.assert_allclose(np.asarray(found.text)[there], np.asarray(alone)[there], atol=2e-5)
    np.testing.assert_allclose(found.outputs["image"], image.outputs["image"], atol=2e-5)


def test_gates_are_told_as_metrics():
    task, params = built("gated_cross_attention")
    ask = jax.jit(functools.partial(task.metrics, deterministic=True))
    metrics = ask(params, tiny.batch(task), jax.random.key(0))
    cross = params["transformer"]["layers"]["cross"]
    for layer in range(2):
        value, count = metrics[f"gate/attention_{layer}"]
        assert float(count) == 1
        expected = np.abs(np.tanh(np.asarray(cross["attention_gate"])[layer, 0]))
        assert float(value) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("fusion", "weight", "named"),
    [
        ("late", "captioning", "captioning"),
        ("late", "matching", "matching"),
        ("gated_cross_attention", "matching", "matching"),
    ],
)
def test_what_a_fusion_cannot_do_is_refused_with_the_table(fusion, weight, named):
    changes = {f"objectives__{name}__weight": 0.0 for name in ("captioning", "matching")}
    changes[f"objectives__{weight}__weight"] = 1.0
    with pytest.raises(ValueError, match=f"cannot serve objectives.{named}") as refused:
        tiny.task(model__fusion=fusion, **changes)
    assert "gated_cross_attention   image features" in str(refused.value)
    with pytest.raises(ValueError, match="'middle' is unknown. What there is:"):
        tiny.task(model__fusion="middle")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__heads": 0}, "model.heads=0: must be at least 1"),
        ({"model__dropout": 1.0}, "model.dropout=1.0: must be at least 0 and below 1"),
        ({"model__dtype": "float99"}, "model.dtype='float99' is no type"),
        ({"model__norm": "batch"}, "model.norm='batch': must be one of layer, rms"),
        ({"model__key_value_heads": 3}, "no multiple of key_value_heads=3"),
        ({"model__modalities__image__patch": 0}, "model.modalities.image.patch=0"),
        ({"data__crop_scale": (0.5,)}, "data.crop_scale="),
        ({"model__modalities__text__length": 2}, "model.modalities.text.length=2"),
        ({"objectives__captioning__weight": -1.0}, "objectives.captioning.weight=-1.0"),
        (
            {"model__fusion": "gated_cross_attention", "model__cross__every": 3,
             "objectives__matching__weight": 0.0},
            "no multiple of model.cross.every=3",
        ),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny.task(**changes)
