"""Hard negatives: which rows may be drawn, how often, and one reading on the saved pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.objectives import StepContext
from unified_mm.objectives.matching import Matching, MatchingHead, mine
from unified_mm.objectives.objective import build_objectives

SIZE = 6
drawn = jax.jit(mine)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    paired=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    texts=st.lists(st.integers(0, 2), min_size=SIZE, max_size=SIZE),
    records=st.lists(st.integers(0, 4), min_size=SIZE, max_size=SIZE),
)
def test_a_negative_is_never_right_nor_equal_nor_unpaired(seed, paired, texts, records):
    rng = np.random.default_rng(seed)
    # The forbidden ones look best: only the mask keeps them out.
    similarity = rng.normal(size=(SIZE, SIZE)) + 30 * np.eye(SIZE)
    similarity[:, ~np.array(paired)] += 30
    ids = np.stack([np.full(SIZE, 7), np.array(texts)], axis=1).astype(np.int32)
    wrong_text, wrong_image, (has_text, has_image) = map_arrays(
        drawn(
            jax.random.key(seed),
            jnp.asarray(similarity, jnp.float32),
            jnp.asarray(paired),
            jnp.asarray(ids),
            jnp.asarray(records, jnp.int32),
        )
    )
    for row in range(SIZE):
        others = [
            j
            for j in range(SIZE)
            if paired[j] and paired[row] and texts[j] != texts[row] and records[j] != records[row]
        ]
        assert has_text[row] == has_image[row] == bool(others)
        if others:
            assert wrong_text[row] in others and wrong_image[row] in others


def map_arrays(tree):
    return jax.tree.map(np.asarray, tree)


def test_negatives_follow_the_softmax_of_similarity():
    similarity = jnp.array(
        [[9.0, 1.0, 0.0, -1.0], [0.3, 9.0, 0.3, 5.0], [2.0, 0.0, 9.0, 5.0], [5.0, 5.0, 5.0, 9.0]]
    )
    paired = jnp.array([True, True, True, False])
    ids = jnp.arange(4, dtype=jnp.int32)[:, None]
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    text, image, _ = jax.jit(jax.vmap(lambda key: mine(key, similarity, paired, ids)))(keys)

    def expected(row_of_logits, own):
        weights = np.exp(np.asarray(row_of_logits, np.float64)) * np.asarray(paired)
        weights[own] = 0
        return weights / weights.sum()

    for row in range(3):
        for found, logits in ((text, similarity[row]), (image, similarity[:, row])):
            shares = np.bincount(np.asarray(found)[:, row], minlength=4) / count
            # Four standard deviations of a share.
            np.testing.assert_allclose(
                shares, expected(logits, row), atol=4 * np.sqrt(0.25 / count)
            )
    # The two draws of a row are independent: they agree as often as chance has it.
    both = np.mean(np.asarray(text)[:, 1] == np.asarray(image)[:, 1])
    chance = (expected(similarity[1], 1) * expected(similarity[:, 1], 1)).sum()
    assert both == pytest.approx(chance, abs=4 * np.sqrt(0.25 / count))


def test_the_head_reads_the_last_valid_token():
    x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    kernel = np.random.default_rng(1).normal(size=(6, 1)).astype(np.float32)
    params = {"score": {"kernel": kernel, "bias": np.array([0.5], np.float32)}}
    found = MatchingHead().apply({"params": params}, jnp.asarray(x), jnp.asarray(valid))
    expected = [x[0, 1] @ kernel, x[1, 3] @ kernel, x[2, 0] @ kernel]
    np.testing.assert_allclose(found, np.concatenate(expected) + 0.5, atol=1e-5)


def test_the_saved_pass_gives_what_encoding_anew_gives_and_the_loss_is_written_out():
    task = tiny.task()
    params = tiny.params(task)
    batch = tiny.batch(task, 5, seed=3)
    batch["image"]["present"] = batch["image"]["present"].at[1].set(False)
    batch["text"] = jax.tree.map(lambda x: x.at[4].set(x[2]), batch["text"])  # equal texts
    matching = next(o for o in task.objectives if o.name == "matching")
    contrastive = next(o for o in task.objectives if o.name == "contrastive")
    image_rows = jnp.array([0, 1, 2, 3, 4, 2, 0, 4, 4])
    text_rows = jnp.array([0, 1, 2, 3, 4, 0, 3, 1, 3])

    def run(model):
        encoded = model.encode(batch, [s for o in task.objectives for s in o.views()])
        text = {name: values[text_rows] for name, values in batch["text"].items()}
        assert matching._can_reuse(encoded, ("image",))
        saved = matching._read(model, encoded, batch, text, image_rows, True)
        both = {"image": {k: v[image_rows] for k, v in batch["image"].items()}, "text": text}
        anew = model.encode(both, (matching.view,))["matching"].text
        context = StepContext(0, {}, {})
        earlier = {"contrastive": contrastive(model, encoded, batch, context, deterministic=True)}
        context = StepContext(0, {}, earlier)
        outcome = matching(model, encoded, batch, context, deterministic=True)
        # Each image with each text, encoded anew.
        extras = earlier["contrastive"].extras
        every = jnp.repeat(jnp.arange(5), 5), jnp.tile(jnp.arange(5), 5)
        pictures = {name: values[every[0]] for name, values in batch["image"].items()}
        texts = {name: values[every[1]] for name, values in batch["text"].items()}
        read = model.encode({"image": pictures, "text": texts}, (matching.view,))
        logits = model.head["matching"](read["matching"].text, texts["valid"]).reshape(5, 5)
        return saved, anew, text["valid"], outcome, extras, logits

    saved, anew, valid, outcome, extras, logits = jax.jit(
        lambda p: task.model.apply({"params": p}, method=run, rngs={"mining": jax.random.key(5)})
    )(params)
    valid = np.asarray(valid)
    np.testing.assert_allclose(np.asarray(saved)[valid], np.asarray(anew)[valid], atol=2e-5)

    paired = np.asarray(extras["paired"])
    np.testing.assert_array_equal(paired, [True, False, True, True, True])
    score = np.asarray(logits, np.float64)  # [image, text]
    texts = np.asarray(batch["text"]["ids"])
    right = [score[i, i] for i in range(5) if paired[i]]
    others = {
        i: [j for j in range(5) if paired[i] and paired[j] and (texts[i] != texts[j]).any()]
        for i in range(5)
    }
    assert float(outcome.loss[1]) == len(right) + 2 * sum(map(bool, others.values()))

    def cross_entropy(logit, truth):
        return np.log1p(np.exp(-logit if truth else logit))

    certain = sum(cross_entropy(x, True) for x in right)
    # Which negatives were drawn is the key's doing: the loss is that of one choice among all.
    sums = {0.0}
    for i in range(5):
        for ways in ([score[i, j] for j in others[i]], [score[j, i] for j in others[i]]):
            if ways:
                sums = {s + cross_entropy(x, False) for s in sums for x in ways}
    distances = np.abs(np.array(sorted(sums)) + certain - float(outcome.loss[0]))
    assert distances.min() < 1e-3


def test_matching_without_the_similarities_it_mines_from_is_refused():
    contrastive = {"type": "contrastive", "weight": 0.0}
    matching = {"type": "matching", "weight": 1.0, "rule": "prefix", "mine_from": "contrastive"}
    with pytest.raises(ValueError, match="needs contrastive.weight above 0"):
        build_objectives({"contrastive": contrastive, "matching": matching})
    built = Matching.from_config("matching", matching)
    assert built.needs() == ("contrastive",) and built.views() == ()
