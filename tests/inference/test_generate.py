"""Writing on the cache, greedily, against reading everything again before each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.generate import begin, generate
from unified_mm.inference.sampling import make_sampling, sampling_arrays
from unified_mm.models.early import EarlyFusion
from unified_mm.models.masks import Stream

LENGTH, END, PADDING, ROWS = 12, 5, 0, 6
WRITING = ("prefix", "causal")


@pytest.fixture(scope="module", params=["early", "gated_cross_attention"])
def task(request):
    changes = {"objectives__matching__weight": 0.0, "model__cross__start": 0.5}
    return tiny.task(model__fusion=request.param, **changes)


def prompts(seed):
    """Ragged starts: at least one token, one of them full but for the last place."""
    rng = np.random.default_rng(seed)
    lengths = np.array([1, 3, 2, 5, LENGTH - 1, 1], np.int32)
    there = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(there, rng.integers(6, 200, there.shape), PADDING)
    ids[3, 2] = END  # an end inside a prompt ends nothing
    return jnp.asarray(ids, jnp.int32), jnp.asarray(lengths)


def start(lengths):
    """Where texts go on, as `begin` takes it: greedily."""
    rows = len(lengths)
    return {
        "most": LENGTH - lengths,
        "stop": jnp.full((rows, 1), END),
        "sampling": make_sampling(**jax.tree.map(jnp.asarray, sampling_arrays(GREEDY, rows))),
        "room": LENGTH - 1,
        "padding": PADDING,
    }


def write(task, params, batch, prompt, lengths, stream):
    """Prompts and what is written after them, as whole rows."""
    valid = jnp.arange(LENGTH) < lengths[:, None]
    text = {"ids": prompt, "valid": valid, "present": jnp.ones(ROWS, bool)}

    def run(params):
        draft = begin(task.model, params, {**batch, "text": text}, stream, **start(lengths))
        return generate(task.model, params, draft, stream, PADDING).written

    rows = np.array(prompt)
    for row, new, first in zip(rows, np.asarray(jax.jit(run)(params)), lengths, strict=True):
        assert (new[LENGTH - first :] == PADDING).all()
        row[first:] = new[: LENGTH - first]
    return rows


def by_full_passes(task, params, batch, prompt, lengths, stream):
    """No cache and no loop on the device: the whole text is read anew for each token."""

    @jax.jit
    def next_logits(ids, valid):
        text = {"ids": ids, "valid": valid, "present": jnp.ones(len(ids), bool)}

        def read(model):
            x = model.encode({**batch, "text": text}, (stream,))[stream.name].text
            return model.logits(x)

        return task.model.apply({"params": params}, method=read)

    ids = np.array(prompt)
    done = np.zeros(len(ids), bool)
    margins = []
    for place in range(1, LENGTH):
        valid = np.arange(LENGTH)[None] < np.full((len(ids), 1), place)
        logits = np.asarray(next_logits(jnp.asarray(ids), jnp.asarray(valid)))[:, place - 1]
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


@pytest.fixture(scope="module")
def params(task):
    """Parameters that write varied tokens, and the end among them."""
    return tiny.writing_params(task, END, seed=1 if isinstance(task.model, EarlyFusion) else 2)


@pytest.mark.parametrize("rule", WRITING)
def test_cached_writing_is_the_likeliest_token_of_a_full_pass(task, params, rule):
    batch = {"image": tiny.batch(task, ROWS, seed=4)["image"]}
    batch["image"]["present"] = batch["image"]["present"].at[2].set(False)
    stream = Stream("captioning", rule, autoregressive=True)
    prompt, lengths = prompts(0)
    written = write(task, params, batch, prompt, lengths, stream)
    expected, done, margin = by_full_passes(task, params, batch, prompt, lengths, stream)
    assert margin > 1e-4, "a tie would make this comparison one of rounding"
    np.testing.assert_array_equal(written, expected)
    # The example is one: some texts end early, some never, and they differ.
    assert done.any() and not done.all()
    assert len({tuple(row) for row in written}) > 3


def test_the_loop_stops_when_all_have_ended(task, params):
    """Where only the end is ever likeliest, each text is its prompt, an end and padding."""
    params = jax.tree.map(lambda x: x, params)
    embedder = params["embedders_text"]
    bias = params["transformer"]["norm"]
    bias["scale"] = jnp.zeros_like(bias["scale"])
    bias["bias"] = embedder["tokens"][END] * 100
    embedder["tokens"] = embedder["tokens"].at[END].multiply(3)
    batch = {"image": tiny.batch(task, ROWS)["image"]}
    prompt, lengths = prompts(1)
    stream = Stream("captioning", "prefix", autoregressive=True)
    written = write(task, params, batch, prompt, lengths, stream)
    for row, length in zip(range(ROWS), np.asarray(lengths), strict=True):
        np.testing.assert_array_equal(written[row, :length], prompt[row, :length])
        assert written[row, length] == END
        assert (written[row, length + 1 :] == PADDING).all()
