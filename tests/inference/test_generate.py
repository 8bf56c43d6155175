"""Writing on the cache, greedily, against reading everything again before each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.generate import TextWriter
from unified_mm.inference.sampling import make_sampling, sampling_arrays
from unified_mm.nn.attention.rules import View

LENGTH, END, PADDING, ROWS = 12, 5, 0, 6


FUSIONS = ("early", "gated_cross_attention")


def view(rule):
    return View("captioning", rule, autoregressive=True)


class Model:
    """A task with parameters that write varied tokens, and the end among them."""

    def __init__(self, fusion, seed):
        changes = {"objectives__matching__weight": 0.0, "model__cross__start": 0.5}
        self.task = tiny.task(model__fusion=fusion, **changes)
        self.params = tiny.writing_params(self.task, END, seed=seed)

    @partial(jax.jit, static_argnums=(0, 5))
    def write(self, params, image, prompt, lengths, view):
        """What is written after the prompts."""
        text = {
            "ids": prompt,
            "valid": jnp.arange(LENGTH) < lengths[:, None],
            "present": jnp.ones(ROWS, bool),
        }
        writer = TextWriter(self.task.model, view, PADDING, LENGTH - 1)
        state = writer.start(params, {"image": image, "text": text}, **starts(lengths))
        return writer.generate(params, state).written

    @partial(jax.jit, static_argnums=(0, 5))
    def next_logits(self, params, image, ids, valid, view):
        text = {"ids": ids, "valid": valid, "present": jnp.ones(len(ids), bool)}

        def read(model):
            x = model.encode({"image": image, "text": text}, (view,))[view.name].text
            return model.logits(x)

        return self.task.model.apply({"params": params}, method=read)


@pytest.fixture(scope="module")
def models():
    return {name: Model(name, seed) for name, seed in zip(FUSIONS, (1, 6), strict=True)}


def prompts(seed):
    """Ragged starts: at least one token, one of them full but for the last place."""
    rng = np.random.default_rng(seed)
    lengths = np.array([1, 3, 2, 5, LENGTH - 1, 1], np.int32)
    there = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(there, rng.integers(6, 200, there.shape), PADDING)
    ids[3, 2] = END  # an end inside a prompt ends nothing
    return jnp.asarray(ids, jnp.int32), jnp.asarray(lengths)


def starts(lengths):
    """Where texts go on, as `start` takes it: greedily."""
    rows = len(lengths)
    return {
        "max_tokens": LENGTH - lengths,
        "stop": jnp.full((rows, 1), END),
        "sampling": make_sampling(**jax.tree.map(jnp.asarray, sampling_arrays(GREEDY, rows))),
    }


def write(model, params, image, prompt, lengths, view):
    """Prompts and what is written after them, as whole rows."""
    rows = np.array(prompt)
    written = np.asarray(model.write(params, image, prompt, lengths, view))
    for row, new, first in zip(rows, written, lengths, strict=True):
        assert (new[LENGTH - first :] == PADDING).all()
        row[first:] = new[: LENGTH - first]
    return rows


def by_full_passes(model, image, prompt, lengths, view):
    """No cache and no loop on the device: the whole text is read anew for each token."""
    ids = np.array(prompt)
    done = np.zeros(len(ids), bool)
    margins = []
    for place in range(1, LENGTH):
        valid = np.arange(LENGTH)[None] < np.full((len(ids), 1), place)
        logits = model.next_logits(model.params, image, ids, valid, view)
        logits = np.asarray(logits)[:, place - 1]
        for row in range(len(ids)):
            if place < lengths[row]:
                continue
            if done[row]:
                ids[row, place] = PADDING
                continue
            ids[row, place] = logits[row].argmax()
            best = np.sort(logits[row])[-2:]
            margins.append(best[1] - best[0])
            done[row] = ids[row, place] == END
    return ids, done, min(margins)


@pytest.mark.parametrize(
    ("fusion", "rule"),
    [("early", "prefix"), ("early", "causal"), ("gated_cross_attention", "prefix")],
)
def test_cached_writing_is_the_likeliest_token_of_a_full_pass(models, fusion, rule):
    model = models[fusion]
    image = tiny.batch(model.task, ROWS, seed=4)["image"]
    image["present"] = image["present"].at[2].set(False)
    prompt, lengths = prompts(0)
    written = write(model, model.params, image, prompt, lengths, view(rule))
    expected, done, margin = by_full_passes(model, image, prompt, lengths, view(rule))
    assert margin > 1e-4, "a tie would make this comparison one of rounding"
    np.testing.assert_array_equal(written, expected)
    # The example is one: some texts end early, some never, and they differ.
    assert done.any() and not done.all()
    assert len({tuple(row) for row in written}) > 3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_loop_stops_when_all_have_ended(models, fusion):
    """Where only the end is ever likeliest, each text is its prompt, an end and padding."""
    model = models[fusion]
    params = jax.tree.map(lambda x: x, model.params)
    embedder = params["embedders_text"]
    bias = params["transformer"]["norm"]
    bias["scale"] = jnp.zeros_like(bias["scale"])
    bias["bias"] = embedder["tokens"][END] * 100
    embedder["tokens"] = embedder["tokens"].at[END].multiply(3)
    image = tiny.batch(model.task, ROWS)["image"]
    prompt, lengths = prompts(1)
    written = write(model, params, image, prompt, lengths, view("prefix"))
    for row, length in zip(range(ROWS), np.asarray(lengths), strict=True):
        np.testing.assert_array_equal(written[row, :length], prompt[row, :length])
        assert written[row, length] == END
        assert (written[row, length + 1 :] == PADDING).all()
