"""Beam search against the likeliest of all texts, and against its definition without a cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.inference.beams import beam_search
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.generate import TextWriter
from unified_mm.nn.attention.rules import View

END, PADDING, ROOM = 5, 0, 6
STREAM = View("captioning", "prefix", autoregressive=True)


@pytest.fixture(scope="module")
def task():
    return tiny.task()


@pytest.fixture(scope="module")
def params(task):
    return tiny.writing_params(task, END)


@pytest.fixture(scope="module")
def search(task, params):
    """Beam search from a begin token, compiled once for each count of rows and beams and room."""

    @partial(jax.jit, static_argnames=("beams", "cache_room"))
    def run(params, image, max_tokens, penalty, *, beams, cache_room):
        rows = len(max_tokens)
        text = {
            "ids": jnp.full((rows, 1), 1),
            "valid": jnp.ones((rows, 1), bool),
            "present": jnp.ones(rows, bool),
        }
        return beam_search(
            TextWriter(task.model, STREAM, PADDING, cache_room),
            params,
            {"image": image, "text": text},
            max_tokens=max_tokens,
            stop=jnp.full((rows, 1), END),
            beams=beams,
            length_penalty=penalty,
        )

    def ask(image, beams, penalty, cache_room, max_tokens=None):
        max_tokens = (
            np.full(len(image["present"]), cache_room)
            if max_tokens is None
            else np.array(max_tokens)
        )
        found = run(
            params, image, max_tokens, np.float32(penalty), beams=beams, cache_room=cache_room
        )
        return jax.tree.map(np.asarray, found)

    return ask


@pytest.fixture(scope="module")
def follows(task, params):
    """Log-likelihoods of what follows each row of tokens, by one pass without a cache."""

    @jax.jit
    def read(params, image, ids, valid):
        text = {"ids": ids, "valid": valid, "present": jnp.ones(len(ids), bool)}
        images = jax.tree.map(lambda x: jnp.repeat(x, len(ids), axis=0), image)

        def scores(model):
            x = model.encode({"image": images, "text": text}, (STREAM,))["captioning"].text
            return jax.nn.log_softmax(model.logits(x))

        return task.model.apply({"params": params}, method=scores)

    def ask(image, rows):
        size = 4 if len(rows) <= 4 else len(rows)
        ids = np.zeros((size, ROOM + 1), np.int32)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens) + 1] = [1, *tokens]
        last = len(rows[0])
        valid = np.tile(np.arange(ROOM + 1) <= last, (size, 1))
        found = read(params, image, jnp.asarray(ids), jnp.asarray(valid))
        return np.asarray(found, np.float64)[: len(rows), last]

    return ask


def reference(follows, image, beams, penalty, cache_room):
    """Beam search as it is defined, in Python, every text read anew for each token."""
    live, ended = [((), 0.0)], []
    for step in range(cache_room):
        likelihood = follows(image, [tokens for tokens, _ in live])
        grown = [
            ((*tokens, token), total + likelihood[row, token])
            for row, (tokens, total) in enumerate(live)
            for token in range(likelihood.shape[1])
        ]
        grown.sort(key=lambda each: -each[1])
        full = step + 1 == cache_room
        ended += [each for each in grown[: 2 * beams] if each[0][-1] == END or full]
        live = [each for each in grown[: 2 * beams] if each[0][-1] != END][:beams]
    ended.sort(key=lambda each: -each[1] / len(each[0]) ** penalty)
    return ended[:beams]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_as_many_beams_as_tokens_find_the_likeliest_of_all_texts(task, search, follows, penalty):
    """All texts of at most two tokens, by their scores alone."""
    image = tiny.batch(task, 1, seed=2)["image"]
    used = task.modalities["text"].embedding.used
    first = follows(image, [()])[0]
    second = follows(image, [(token,) for token in range(used)])
    scores = {(END,): first[END]}
    for token in range(used):
        if token != END:
            scores |= {
                (token, last): (first[token] + second[token, last]) / 2**penalty
                for last in range(used)
            }
    best = sorted(scores, key=lambda tokens: -scores[tokens])[:5]
    written, _ = search(image, used, penalty, 2)
    found = [tuple(int(t) for t in row if t != PADDING) for row in written[0, :5]]
    assert found == best


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 0.0), (3, 1.0), (3, 0.6)])
def test_beams_are_those_of_the_definition(task, search, follows, beams, penalty):
    cache_room = ROOM
    images = tiny.batch(task, 3, seed=7)["image"]
    written, likelihood = search(images, beams, penalty, cache_room)
    for row in range(3):
        image = jax.tree.map(lambda x, row=row: x[row : row + 1], images)
        expected = reference(follows, image, beams, penalty, cache_room)
        for place, (tokens, total) in enumerate(expected):
            assert tuple(written[row, place, : len(tokens)]) == tokens
            assert (written[row, place, len(tokens) :] == PADDING).all()
            assert likelihood[row, place] == pytest.approx(total, abs=2e-3)


def test_each_text_has_its_own_room(task, search):
    images = tiny.batch(task, 3, seed=7)["image"]
    written, likelihood = search(images, 3, 1.0, 6, max_tokens=[6, 2, 0])
    assert (written[1, :, 2:] == PADDING).all() and (written[2] == PADDING).all()
    assert np.isfinite(likelihood[:2]).all() and np.isneginf(likelihood[2]).all()
    alone, _ = search(images, 3, 1.0, 6)
    np.testing.assert_array_equal(written[0], alone[0])


def test_one_beam_writes_what_greedy_does_and_more_beams_something_likelier():
    model = tiny.loaded()
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    greedy = model.generate(images, [""] * 6)
    beams = model.generate(images, [""] * 6, Decoding(beams=4, samples=2, length_penalty=0.0))
    for (one,), (best, next_best) in zip(greedy, beams, strict=True):
        assert best.log_likelihood >= next_best.log_likelihood
        assert best.log_likelihood >= one.log_likelihood - 1e-4
    assert any(best[0].text != one.text for (one,), best in zip(greedy, beams, strict=True))
