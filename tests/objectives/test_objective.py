"""All objectives together: one pass over the image, and nothing from what is absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.default_config import default_config
from unified_mm.nn.attention.rules import RULES
from unified_mm.nn.transformer import Transformer
from unified_mm.objectives.captioning import Captioning, score_text
from unified_mm.objectives.contrastive import Contrastive, counted_rows
from unified_mm.objectives.objective import (
    as_metrics,
    build_objectives,
    masked_metric,
    mean,
    text_valid,
)
from unified_mm.parallel.sharding import without_names

KEY = jax.random.key(0)
CAPTIONING = {"type": "captioning", "weight": 1.0, "rule": "prefix", "chunk": 0}


@pytest.mark.parametrize("separate", [False, True])
def test_the_image_is_encoded_once_a_step(monkeypatch, separate):
    """Of everything that the transformer is given, each image's tokens are there one time."""
    task = tiny.task(model__separate_feed_forward=separate)
    given = []
    call = Transformer.__call__

    def spied(self, x, plan, *rest, **named):
        images = sum(group.length for group in plan.groups if group.modality == "image")
        texts = sum(group.length for group in plan.groups if group.modality == "text")
        given.append((x.shape[0], images, texts))
        return call(self, x, plan, *rest, **named)

    monkeypatch.setattr(Transformer, "__call__", spied)
    params = jax.eval_shape(task.init, KEY)
    given.clear()
    batch = tiny.batch(task, 4)
    jax.eval_shape(lambda p: task.metrics(p, batch, KEY, deterministic=True), without_names(params))
    assert sum(rows * images for rows, images, _ in given) == 4 * 4
    # Contrast and captioning beside the image, then matching's three texts an image on its own.
    assert sorted(given) == [(4, 4, 24), (12, 0, 12)]


def test_absent_examples_are_invisible_and_unscored():
    """A batch with rows that lack something scores as the batch without these rows."""
    task = tiny.task(objectives__matching__weight=0.0)
    params = tiny.params(task)
    batch = tiny.batch(task, 6)
    keep = np.array([0, 2, 5])
    holes = jax.tree.map(lambda x: x, batch)
    holes["image"]["present"] = batch["image"]["present"].at[np.array([1, 3])].set(False)
    holes["text"]["present"] = batch["text"]["present"].at[np.array([3, 4])].set(False)
    run = jax.jit(lambda b: task.metrics(params, b, KEY, deterministic=True))
    whole = run(holes)
    without = run(jax.tree.map(lambda x: x[keep], batch))
    for name in ("contrastive/loss", "contrastive/accuracy"):
        np.testing.assert_allclose(whole[name], without[name], rtol=1e-5)
    # A text without its image is captioned all the same: it adds its tokens and no more.
    text_alone = jax.tree.map(lambda x: x[np.array([1, 1, 1])], holes)
    alone = run(text_alone)["captioning/loss"]
    expected = [a + b / 3 for a, b in zip(without["captioning/loss"], alone, strict=True)]
    np.testing.assert_allclose(whole["captioning/loss"], expected, rtol=1e-5)
    assert float(alone[1]) > 0


@pytest.mark.parametrize("slots", [1, 4])
def test_what_has_slots_is_not_joined_with_what_has_none(slots):
    """With one slot, or as many as rows, [B, S] would broadcast against [B]."""
    rows, slotted, tokens = np.ones(4, bool), np.ones((4, slots), bool), np.ones((4, 4), bool)
    text = {"present": rows, "prompted": ~rows, "valid": tokens, "scored": tokens}
    batch = jax.tree.map(jnp.asarray, {"image": {"present": slotted}, "text": text})
    ids, embeddings = jnp.ones((4, 4), jnp.int32), jnp.ones((4, 4, 2))
    slotted = {"valid": jnp.ones((4, slots, 4), bool), "ids": ids}
    slotted_text = {"text": {**batch["text"], **slotted}}
    for join, given in (
        (lambda batch: counted_rows(batch, ("image", "text")), batch),
        (lambda batch: text_valid(batch["text"]), slotted_text),
        (lambda batch: score_text(lambda x: x, embeddings, batch["text"]), slotted_text),
        (lambda batch: masked_metric(jnp.ones(4), batch["image"]["present"]), batch),
    ):
        with pytest.raises(
            ValueError, match="numpy_rank_promotion|cannot be counted by|have several"
        ):
            join(given)


def test_a_batch_of_nothing_is_a_loss_of_zero():
    task = tiny.task()
    params = tiny.params(task)
    nothing = jax.tree.map(jnp.asarray, task.example_batch(2))

    def total(params):
        metrics = task.metrics(params, nothing, KEY, deterministic=True)
        return sum(mean(metrics[f"{o.name}/loss"]) for o in task.objectives), metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert value == 0
    assert all(float(metrics[f"{o.name}/loss"][1]) == 0 for o in task.objectives)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_objectives_come_after_those_they_need_and_weight_zero_switches_off():
    contrastive = default_config().objectives.contrastive.to_dict()
    matching = {"type": "matching", "weight": 1.0, "rule": "prefix", "mine_from": "contrastive"}
    built = build_objectives(
        {"matching": matching, "contrastive": contrastive, "captioning": CAPTIONING}
    )
    names = [objective.name for objective in built]
    assert names.index("contrastive") < names.index("matching") and len(names) == 3
    built = build_objectives({"c": contrastive, "captioning": {**CAPTIONING, "weight": 0.0}})
    assert [type(objective) for objective in built] == [Contrastive]
    with pytest.raises(ValueError, match="no objective has a weight above 0"):
        build_objectives({"captioning": {**CAPTIONING, "weight": 0.0}})
    with pytest.raises(ValueError, match="unknown objective 'captionning'. Did you mean 'capt"):
        build_objectives({"c": {**CAPTIONING, "type": "captionning"}})
    named = build_objectives(
        {"c": {**CAPTIONING, "type": "unified_mm.objectives.captioning:Captioning"}}
    )
    assert named == (Captioning("c", 1.0, "prefix"),)


def test_pairs_add_up_and_nothing_has_mean_zero():
    values, where = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    assert [float(x) for x in masked_metric(values, where)] == [4.0, 2.0]
    assert float(mean((4.0, 2.0))) == 2.0 and float(mean((0.0, 0.0))) == 0.0
    assert as_metrics({}) == {}


def test_one_context_comes_out_alike_under_rules_that_differ_between_contexts():
    separate, prefix = RULES["separate"], RULES["prefix"]
    one, two = ("image",), ("image", "sound")
    assert separate.context_view(one) == prefix.context_view(one)
    assert separate.context_view(two) != prefix.context_view(two)
    assert RULES["causal"].context_view(one) != prefix.context_view(one)
    assert RULES["joint"].context_view(one) is None  # it sees the text
