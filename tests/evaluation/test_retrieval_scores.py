"""Retrieval: brute-force ranks, ties, chance by simulation, and the duplicate-caption ceiling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unified_mm.evaluation.retrieval import (
    chance,
    duplicate_caption_ceiling,
    ranks,
    retrieval_scores,
)


def brute_force_ranks(images, texts, image_of_text):
    """Ranks from the definition, one comparison at a time."""
    scores = images.astype(float) @ texts.T.astype(float)
    text_to_image = [
        1 + sum(scores[i, c] >= scores[own, c] for i in range(len(images)) if i != own)
        for c, own in enumerate(image_of_text)
    ]
    image_to_text = []
    for i in range(len(images)):
        best = max((scores[i, c] for c in np.flatnonzero(image_of_text == i)), default=None)
        if best is not None:
            wrong = np.flatnonzero(image_of_text != i)
            image_to_text.append(1 + sum(scores[i, c] >= best for c in wrong))
    return text_to_image, image_to_text


@st.composite
def corpora(draw):
    """Integer embeddings of few values, so that exact ties are common."""
    image_count, text_count, width = (draw(st.integers(1, n)) for n in (7, 12, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (
        random.integers(-1, 2, (image_count, width)).astype(np.float32),
        random.integers(-1, 2, (text_count, width)).astype(np.float32),
        random.integers(0, image_count, text_count),
    )


@given(corpora(), st.integers(1, 8))
def test_ranks_match_brute_force(corpus, block_size):
    found = ranks(*corpus, block_size=block_size)
    text_to_image, image_to_text = brute_force_ranks(*corpus)
    assert found.text_to_image.tolist() == text_to_image
    assert found.image_to_text.tolist() == image_to_text


@given(corpora(), st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_order(corpus, seed):
    images, texts, image_of_text = corpus
    random = np.random.default_rng(seed)
    image_order, text_order = random.permutation(len(images)), random.permutation(len(texts))
    shuffled = (
        images[image_order],
        texts[text_order],
        np.argsort(image_order)[image_of_text[text_order]],
    )
    assert retrieval_scores(*shuffled) == pytest.approx(retrieval_scores(*corpus))


def test_by_hand():
    images = np.eye(3, dtype=np.float32)
    # Caption 1 of image 0 looks like image 1, caption 2 is right, caption 3 ties images 1 and 2.
    texts = np.array([[3, 0, 0], [1, 2, 0], [0, 3, 0], [0, 1, 1]], np.float32)
    image_of_text = np.array([0, 0, 1, 2])
    found = ranks(images, texts, image_of_text)
    assert found.text_to_image.tolist() == [1, 2, 1, 2]
    assert found.image_to_text.tolist() == [1, 1, 1]
    scores = retrieval_scores(images, texts, image_of_text)
    assert scores["text_to_image/recall_at_1"] == 0.5
    assert scores["text_to_image/recall_at_5"] == 1.0
    assert scores["text_to_image/median_rank"] == 1.5
    assert scores["image_to_text/recall_at_1"] == 1.0
    assert len(scores) == 8


def test_collapsed_embeddings_come_last():
    """Equal vectors whose scores could differ by rounding within one matrix product."""
    vector = np.random.default_rng(0).normal(size=333).astype(np.float32)
    vector /= np.linalg.norm(vector)
    images, texts = np.tile(vector, (301, 1)), np.tile(vector, (602, 1))
    found = ranks(images, texts, np.repeat(np.arange(301), 2))
    assert set(found.text_to_image.tolist()) == {301}
    assert set(found.image_to_text.tolist()) == {601}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["image", "text"])
def test_embeddings_that_are_not_finite(bad, which):
    images, texts = np.ones((4, 2), np.float32), np.ones((5, 2), np.float32)
    (images if which == "image" else texts)[[1, 3], 0] = bad
    with pytest.raises(ValueError, match=rf"2 of . {which} embeddings .*first: row 1"):
        ranks(images, texts, np.zeros(5, int))


@pytest.mark.parametrize(("index", "value"), [(2, 2), (-1, -1)])
def test_index_out_of_range(index, value):
    ones = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match=f"holds {value}, but there are 2 images"):
        ranks(ones, ones, np.array([0, index]))


def test_no_captions():
    with pytest.raises(ValueError, match="no captions"):
        chance(np.zeros(0, int), 3)


def test_chance_of_one_caption_each():
    scores = chance(np.arange(1000), 1000)
    for direction in ("text_to_image", "image_to_text"):
        assert scores[f"{direction}/recall_at_1"] == pytest.approx(0.001)
        assert scores[f"{direction}/recall_at_5"] == pytest.approx(0.005)
        assert scores[f"{direction}/recall_at_10"] == pytest.approx(0.010)
        assert scores[f"{direction}/median_rank"] == 500.5


def test_chance_of_a_small_world_is_certain():
    assert chance(np.array([0, 1, 1]), 2)["text_to_image/recall_at_5"] == 1.0


def test_chance_matches_random_embeddings():
    image_of_text = np.repeat(np.arange(25), [1, 2, 3, 4, 5] * 5)
    random = np.random.default_rng(0)
    trials = [
        retrieval_scores(random.normal(size=(25, 64)), random.normal(size=(75, 64)), image_of_text)
        for _ in range(400)
    ]
    for name, expected in chance(image_of_text, 25).items():
        tolerance = 1.0 if name.endswith("median_rank") else 0.015
        assert np.mean([t[name] for t in trials]) == pytest.approx(expected, abs=tolerance), name


def test_ceiling_without_duplicates_is_perfect():
    scores = duplicate_caption_ceiling(["a", "b", "c", "c"], np.array([0, 1, 2, 2]))
    assert scores == retrieval_scores(np.eye(3), np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 2]))
    assert all(value == 1.0 for value in scores.values())


def test_ceiling_by_hand():
    # "x" belongs to six images, "y" to one of them; image 6 says "z" twice, image 7 once.
    texts = ["x"] * 6 + ["y"] + ["z", "z", "z"]
    image_of_text = np.array([0, 1, 2, 3, 4, 5, 0, 6, 6, 7])
    scores = duplicate_caption_ceiling(texts, image_of_text)
    # At 1: one of the six "x", the "y", and the two "z" of image 6.
    assert scores["text_to_image/recall_at_1"] == pytest.approx(0.4)
    assert scores["text_to_image/recall_at_5"] == pytest.approx(0.9)
    assert scores["text_to_image/recall_at_10"] == 1.0
    # Image 0 is served by "y"; images 1 to 5 tie with five others; 6 with one, 7 with two.
    assert scores["image_to_text/recall_at_1"] == pytest.approx(1 / 8)
    assert scores["image_to_text/recall_at_5"] == pytest.approx(3 / 8)
    assert scores["image_to_text/median_rank"] == 6.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=12))
def test_no_model_passes_the_ceiling(captions):
    """Any embeddings, as long as equal captions get equal ones."""
    texts, image_of_text = [text for text, _ in captions], np.array([i for _, i in captions])
    ceiling = duplicate_caption_ceiling(texts, image_of_text)
    random = np.random.default_rng(0)
    for _ in range(5):
        vector = {text: random.normal(size=8) for text in "abc"}
        model = retrieval_scores(
            random.normal(size=(5, 8)), np.stack([vector[t] for t in texts]), image_of_text
        )
        for name, value in model.items():
            if name.endswith("median_rank"):
                assert value >= ceiling[name]
            else:
                assert value <= ceiling[name] + 1e-12


def test_ceiling_needs_an_index_per_text():
    with pytest.raises(ValueError, match="2 texts but 1 image indices"):
        duplicate_caption_ceiling(["a", "b"], np.array([0]))
