"""Maps of attention over an image, for each word that was written about it."""

from copy import copy
from functools import cache

import jax
import numpy as np
import pytest
import tiny

from unified_mm.analysis.attention_maps import attention_over_patches, attention_weights
from unified_mm.config import Config
from unified_mm.inference.loaded import LoadedModel, one_device_mesh

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
GATED = {
    "model__fusion": "gated_cross_attention",
    "model__resampler__layers": 2,
    "model__resampler__heads": 2,
    "model__resampler__head_width": 4,
    "model__cross__start": 0.5,
    "objectives__matching__weight": 0.0,
}
NO_WRITING = {"objectives__captioning__weight": 0.0, "objectives__matching__weight": 0.0}
CLASS_TOKEN = {"model__modalities__image__class_token": True}
PATCHES = {"model__modalities__image__patch": 4}
MODELS = {
    "early": PATCHES | CLASS_TOKEN,
    "gated": PATCHES | GATED | {"model__resampler__latents": 3},
    "gated, every feature": GATED | CLASS_TOKEN | {"model__resampler__latents": 0},
    "late": {"model__fusion": "late"} | NO_WRITING,
}
WRITING = ("early", "gated", "gated, every feature")


@cache
def loaded(name):
    changes = MODELS[name]
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes).to_dict())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), config, 0)


def by_loops(model, prompt, text, words):
    """Every word's map token by token, layer by layer and head by head."""
    task = model.task
    (captioning,) = (each for each in task.objectives if each.name == "captioning")
    row = {"text": task.modalities["text"].encode(prompt, text)}
    row["image"] = {"pixels": IMAGE, "present": np.array(True)}
    batch = jax.tree.map(lambda leaf: leaf[None], row)
    found = attention_weights(model, batch, captioning.view)
    place = len(task.tokenizer.encode_prompt(prompt))
    side = 16 // task.modalities["image"].embedding.patch
    maps = []
    for word in words:
        # In this vocabulary a space begins a word's first token.
        count = len(task.tokenizer.ids(word))
        rows = [_looks(found, place + i - 1, side * side) for i in range(count)]
        place += count
        maps.append(np.mean(rows, axis=0))
    maps = np.array(maps)
    return (maps / maps.sum(1, keepdims=True)).reshape(-1, side, side)


def _looks(found, query, patches):
    cross = found.get("transformer/layers/cross/attention")
    if cross is None:
        values = found["transformer/layers/block_0/attention"].values
        image = values.shape[-1] - 12
        return _mean(values[:, 0, :, image + query, image - patches : image])
    taken = _mean(cross.values[:, 0, :, query])
    resamplers = [each.values[0, 0] for path, each in found.items() if "resamplers" in path]
    if not resamplers:
        return taken[-patches:]
    looks = np.zeros(patches)
    for latent in range(3):
        row = _mean([head[latent, :patches] for values in resamplers for head in values])
        looks += taken[latent] * row / row.sum()
    return looks


def _mean(rows):
    """Of all but the last axis, by a loop."""
    rows = np.asarray(rows)
    rows = rows.reshape(-1, rows.shape[-1])
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    return total / len(rows)


@pytest.mark.parametrize("name", WRITING)
def test_a_map_for_each_word(name):
    model = loaded(name)
    for prompt, text in (("", "a red square"), ("blue", "size 2")):
        words, maps = attention_over_patches(model, IMAGE, prompt, text)
        assert words == text.split()
        np.testing.assert_allclose(maps, by_loops(model, prompt, text, words), atol=1e-5)
        np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-5)
        assert maps.dtype == np.float32 and np.abs(maps[0] - maps[1]).max() > 1e-5


@pytest.fixture(scope="module")
def early():
    return loaded("early")


def test_attention_that_prefers_nothing_gives_an_even_map(early):
    indifferent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "query" in str(path) else leaf, early.predictor.params
    )
    model = copy(early)
    model.predictor = early.predictor.at(indifferent)
    _, maps = attention_over_patches(model, IMAGE, "", "a red square")
    np.testing.assert_allclose(maps, 1 / 16, atol=1e-6)


def test_words_that_the_model_does_not_read_are_left_out(early):
    words, maps = attention_over_patches(early, IMAGE, "", "red " * 30)
    count = len(early.task.tokenizer.ids(" red"))
    assert len(words) == len(maps) == -(-11 // count) and set(words) == {"red"}


def test_what_cannot_be_drawn_is_refused(early):
    late = loaded("late")
    with pytest.raises(ValueError, match="model.fusion='late'. writes no text about images"):
        attention_over_patches(late, IMAGE, "", "red")
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match="has no word to draw attention for"):
            attention_over_patches(early, IMAGE, "", nothing)
    with pytest.raises(ValueError, match="leaves no room after the prompt"):
        attention_over_patches(early, IMAGE, "a long question " * 5, "red")
