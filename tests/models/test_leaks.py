"""Who sees whom, by autodiff on the whole model: where sight is forbidden the Jacobian is zero."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.models.unified import text_group
from unified_mm.nn.attention.rules import PREDICATES, View, plan_passes
from unified_mm.nn.tokens import Group, TokenMetadata

OTHER_PATH = {"model__remat": "full", "model__separate_attention": True, "model__unroll": 2}


@pytest.fixture(scope="module")
def built():
    task = tiny.task()
    return task, tiny.params(task)


@pytest.fixture(scope="module")
def built_otherwise():
    """Rematerialised, unrolled, with attention of its own for each modality."""
    task = tiny.task(**OTHER_PATH)
    return task, tiny.params(task)


def read(task, params, views, batch, perturb):
    """All streams' texts and contexts, with `perturb` added to the input embeddings."""

    def run(model):
        outputs = {}
        for together in plan_passes(views, model.context_names):
            context = [
                part.replace(embeddings=part.embeddings + perturb[name])
                for name, part in zip(model.context_names, model.embed_context(batch), strict=True)
            ]
            texts = []
            for view in together:
                text = model.embed_text(batch["text"], view.name, 4)
                texts.append(text.replace(embeddings=text.embeddings + perturb["text"]))
            outputs |= model.encode_together(context, texts, together)
        return {
            name: {"text": each.text, "image": each.outputs["image"]}
            for name, each in outputs.items()
        }

    return task.model.apply({"params": params}, method=run)


def seen_by(task, params, views, batch):
    """For each stream: the sizes of d output[kind, b, q] / d input[kind', b', k], summed over D."""
    zero = {
        name: jnp.zeros((*shape, task.model.options.width))
        for name, shape in {
            "image": (2, 4),
            "text": batch["text"]["ids"].shape,
        }.items()
    }
    # One random direction over the width a (row, token): its gradient is zero only if all are.
    weights = jax.random.normal(jax.random.key(7), (task.model.options.width,))

    def outputs(perturb):
        read_ = read(task, params, views, batch, perturb)
        return jax.tree.map(lambda x: x @ weights, read_)

    jacobian = jax.jit(jax.jacrev(outputs))(zero)
    return jax.tree.map(lambda x: np.abs(np.asarray(x)).sum(-1), jacobian)


STREAMS = {
    "joint": (View("t", "joint"),),
    "causal": (View("t", "causal", autoregressive=True),),
    "blind": (View("t", "separate", autoregressive=True),),
    "shared": (View("c", "separate"), View("t", "prefix", autoregressive=True)),
}


NAMES = {predicate: name for name, predicate in PREDICATES.items()}


def expected(rule, query, key, q, k):
    """BlockMask by the rule's definition in words, for one example; text 12 tokens, image 4."""
    groups = [Group(name, name, 1) for name in (query, key)]
    predicate, _ = rule.between(*groups, (query == "text", key == "text"))
    before = k <= q if query == key else query == "text"  # the image comes first
    return {"none": False, "all": True, "causal": before}[NAMES[predicate]]


@pytest.mark.parametrize("name", STREAMS)
def test_sight_is_what_the_rule_says(built, name):
    check_sight(*built, STREAMS[name])


def test_sight_is_the_same_on_the_other_path(built_otherwise):
    check_sight(*built_otherwise, STREAMS["shared"])


def check_sight(task, params, views):
    """The Jacobian of every output is zero just where the rule forbids sight."""
    batch = tiny.batch(task, 2)
    valid = np.asarray(batch["text"]["valid"])
    seen = seen_by(task, params, views, batch)
    for view in views:
        rule = view.resolved
        for query, key in itertools.product(("image", "text"), repeat=2):
            sizes = seen[view.name][query][key]  # [b, q, b', k]
            for b, other in itertools.product(range(2), repeat=2):
                rows = np.flatnonzero(valid[b]) if query == "text" else range(4)
                for q in rows:
                    for k in range(sizes.shape[3]):
                        allowed = b == other and expected(rule, query, key, q, k)
                        if key == "text":
                            allowed = allowed and valid[other, k]
                        assert (sizes[b, q, other, k] > 0) == bool(allowed), (
                            view,
                            query,
                            b,
                            q,
                            key,
                            other,
                            k,
                        )


def test_pixels_never_reach_the_contrastive_text_nor_text_the_image(built):
    """From raw pixels, through the whole task, to the embedding that is compared."""
    task, params = built
    batch = tiny.batch(task, 2)
    contrastive = next(o for o in task.objectives if o.name == "contrastive")

    def embeddings(pixels):
        changed = {**batch, "image": {**batch["image"], "pixels": pixels}}

        def run(model):
            encoded = model.encode(changed, [s for o in task.objectives for s in o.views()])
            each = encoded["contrastive"]
            head = model.head["contrastive"]
            ones = jnp.ones(each.outputs["image"].shape[:2], bool)
            valid = batch["text"]["valid"]
            return head("image", each.outputs["image"], ones), head("text", each.text, valid)

        return task.model.apply({"params": params}, method=run)

    assert contrastive.rule == "separate"
    jacobian = jax.jit(jax.jacrev(lambda p: embeddings(p)))(batch["image"]["pixels"])
    image, text = (np.abs(np.asarray(j)).sum(axis=(1, 3, 4, 5)) for j in jacobian)
    assert (text == 0).all()
    assert image[0, 0] > 0 and image[1, 1] > 0 and image[0, 1] == 0 and image[1, 0] == 0


def test_later_caption_tokens_never_reach_earlier_logits(built):
    task, params = built
    batch = tiny.batch(task, 2)
    captioning = next(o for o in task.objectives if o.name == "captioning")

    def logits(text):
        encoded = task.model.apply(
            {"params": params}, {**batch, "text": text}, captioning.views(), method="encode"
        )
        return task.model.apply({"params": params}, encoded["captioning"].text, method="logits")

    before = jax.jit(logits)(batch["text"])
    ids = batch["text"]["ids"]
    for place in (1, 3):
        changed = ids.at[0, place].set(ids[0, place] + 1)
        after = jax.jit(logits)({**batch["text"], "ids": changed})
        assert (np.asarray(before[0, :place]) == np.asarray(after[0, :place])).all()
        assert (np.asarray(before[1]) == np.asarray(after[1])).all()
        assert (np.asarray(before[0, place]) != np.asarray(after[0, place])).any()


def test_packed_documents_never_see_each_other(built):
    """Two documents in one sequence, image and text interleaved between them by metadata."""
    task, params = built
    batch = tiny.batch(task, 1)
    document = {"image": jnp.array([[0, 0, 1, 1]]), "text": jnp.array([[0] * 5 + [1] * 7])}
    batch["text"]["valid"] = jnp.ones_like(batch["text"]["valid"])
    view = View("t", "prefix", autoregressive=True)

    def outputs(perturb):
        def run(model):
            parts = [*model.embed_context(batch), model.embed_text(batch["text"], "t")]
            changed = []
            for part, name in zip(parts, ("image", "text"), strict=True):
                metadata = part.metadata.replace(document=document[name])
                changed.append(
                    part.replace(embeddings=part.embeddings + perturb[name], metadata=metadata)
                )
            encoded = model.encode_together(changed[:1], changed[1:], (view,))["t"]
            return {"image": encoded.outputs["image"], "text": encoded.text}

        return jax.tree.map(lambda x: x.sum(-1), task.model.apply({"params": params}, method=run))

    width = task.model.options.width
    zero = {"image": jnp.zeros((1, 4, width)), "text": jnp.zeros((1, 12, width))}
    jacobian = jax.jit(jax.jacrev(outputs))(zero)
    for query, key in itertools.product(("image", "text"), repeat=2):
        sizes = np.abs(np.asarray(jacobian[query][key])).sum(-1)[0, :, 0]
        same = np.asarray(document[query])[0][:, None] == np.asarray(document[key])[0][None]
        assert (sizes[~same] == 0).all(), (query, key)
    assert np.abs(np.asarray(jacobian["text"]["image"])).sum() > 0


@pytest.fixture(scope="module")
def loss_and_gradient(built):
    """All objectives' losses, added up, and their gradient."""
    task, params = built

    def total(params, batch):
        metrics = task.metrics(params, batch, jax.random.key(3), deterministic=True)
        return sum(metrics[f"{o.name}/loss"][0] for o in task.objectives)

    both = jax.jit(jax.value_and_grad(total))
    return lambda batch: both(params, batch)


@pytest.mark.parametrize("absent", ["image", "text", "padding"])
def test_nan_where_nothing_is_changes_nothing(built, loss_and_gradient, absent):
    task, _ = built
    batch = tiny.batch(task, 4)
    if absent == "padding":
        poisoned = {
            **batch,
            "text": {
                **batch["text"],
                "ids": jnp.where(batch["text"]["valid"], batch["text"]["ids"], 77),
            },
        }
    else:
        present = jnp.array([True, False, True, True])
        batch = {**batch, absent: {**batch[absent], "present": present}}
        poisoned = dict(batch)
        if absent == "image":
            pixels = batch["image"]["pixels"].at[1].set(jnp.nan)
            poisoned["image"] = {**batch["image"], "pixels": pixels}
        else:
            ids = batch["text"]["ids"].at[1].set(5)
            poisoned["text"] = {**batch["text"], "ids": ids}

    value, gradient = loss_and_gradient(batch)
    poisoned_value, poisoned_gradient = loss_and_gradient(poisoned)
    assert np.isfinite(value) and value == poisoned_value
    for clean, dirty in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(poisoned_gradient), strict=True
    ):
        assert np.isfinite(clean).all()
        np.testing.assert_array_equal(clean, dirty)


def test_an_autoregressive_text_under_a_leaking_rule_is_refused():
    with pytest.raises(ValueError, match="would see the one it must predict"):
        View("captioning", "joint", autoregressive=True)


def test_cache_slots_that_hold_nothing_are_never_seen(built):
    """Poison in the slots a cache has reserved does not reach what is read beside it."""
    task, params = built
    batch = tiny.batch(task, 2)
    view = View("t", "prefix", autoregressive=True)
    text = {name: values[:, :5] for name, values in batch["text"].items() if values.ndim == 2}
    text = {**text, "present": batch["text"]["present"]}

    def run(model, poison):
        cache = model.read_context(batch, view).cache.reserve(text_group(view, 12))
        assert isinstance(cache.metadata, TokenMetadata)
        layers = jax.tree.map(lambda x: x.at[:, :, 9:].set(poison), cache.layers)
        return model.extend(cache.replace(layers=layers), text, view)[0]

    extend = jax.jit(lambda poison: task.model.apply({"params": params}, poison, method=run))
    np.testing.assert_array_equal(extend(0.0), extend(1e4))
