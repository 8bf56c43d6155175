"""Features by layer: pooled from the tokens that they are said to be of."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.analysis.layer_features import image_features, reading_stream, text_features
from unified_mm.config import Config
from unified_mm.inference.loaded import LoadedModel, one_device_mesh

NO_MATCHING = {"objectives__matching__weight": 0.0}
MODELS = {
    "early": NO_MATCHING | {"model__modalities__image__patch": 4},
    "late": NO_MATCHING | {"model__fusion": "late", "objectives__captioning__weight": 0.0},
    "gated": NO_MATCHING
    | {
        "model__fusion": "gated_cross_attention",
        "model__tower__layers": 1,
        "model__resampler__latents": 3,
        "model__resampler__layers": 1,
        "model__resampler__heads": 2,
        "model__resampler__head_width": 4,
    },
}
IMAGES = np.random.default_rng(0).integers(0, 256, (35, 16, 16, 3), np.uint8)


@cache
def loaded(name):
    changes = MODELS[name]
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes).to_dict())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), config, 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_what_the_model_gives(name):
    model = loaded(name)
    found = image_features(model, iter(IMAGES))
    layers = ["layer_0"] if name == "gated" else ["layer_0", "layer_1"]
    assert list(found) == ["embedded", *layers, "output"]
    assert all(x.shape == (35, 16) and x.dtype == np.float32 for x in found.values())
    batch = {"image": {"pixels": IMAGES[:3], "present": np.ones(3, bool)}}
    text = [model.task.modalities["text"].encode("", text) for text in tiny.TEXTS[:3]]
    batch["text"] = jax.tree.map(lambda *leaves: np.stack(leaves), *text)
    batch = jax.tree.map(jnp.asarray, batch)
    stream = reading_stream(model)

    @jax.jit
    def read(params, batch):
        def ask(*args, method):
            return model.task.model.apply({"params": params}, *args, method=method)

        return (
            ask(
                batch["image"], method=lambda model, image: model.embedders["image"](image)
            ).embeddings,
            ask(batch, stream, method="read_context").outputs["image"],
            ask(batch["text"], stream, method="read_text"),
        )

    embedded, context, x = map(np.asarray, read(model.params, batch))
    np.testing.assert_allclose(found["output"][:3], context.mean(1), atol=1e-5)
    np.testing.assert_allclose(found["embedded"][:3], embedded.mean(1), atol=1e-5)
    valid = np.asarray(batch["text"]["valid"])
    means = [row[seen].mean(0) for row, seen in zip(x, valid)]
    read = text_features(model, tiny.TEXTS[:3])
    np.testing.assert_allclose(read["output"], np.stack(means), atol=1e-5)
    cross = name == "gated"
    assert [each for each in read if each.startswith("cross")] == ["cross_0", "cross_1"] * cross


def test_nothing_and_no_images_are_refused():
    model = loaded("late")
    with pytest.raises(ValueError, match="nothing to take features of"):
        image_features(model, [])
    with pytest.raises(ValueError, match="an image is a path"):
        image_features(model, [np.zeros((4, 4), np.uint8)])
