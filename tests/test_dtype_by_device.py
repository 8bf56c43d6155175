"""What is computed in where a recipe leaves it open: bfloat16 on accelerators, float32 on a CPU."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from unified_mm.cli.recipes import read_recipe, resolve
from unified_mm.config import Config
from unified_mm.nn.options import TransformerOptions


def computes_in(recipe, *flags, **more):
    return resolve(read_recipe(recipe, flags), lambda line: None, **more).model.dtype


@pytest.mark.parametrize("name", ["coco", "coco_documents", "coco_flamingo"])
def test_our_recipes_leave_it_to_the_device(name):
    assert computes_in(f"{name}:base") == "float32"
    for platform in ("gpu", "tpu"):
        assert computes_in(f"{name}:base", platform=platform) == "bfloat16"
        asked = "--config.model.dtype=float32"
        assert computes_in(f"{name}:base", asked, platform=platform) == "float32"


def test_the_size_is_chosen_for_the_same_device():
    found = resolve(read_recipe("coco", ()), lambda line: None, platform="gpu")
    assert (found.size, found.model.dtype) == ("base", "bfloat16")
    found = resolve(read_recipe("coco", ()), lambda line: None)
    assert (found.size, found.model.dtype) == ("tiny", "float32")


def test_a_run_goes_on_in_what_it_began_with():
    saved = {"model": {"dtype": "float32"}}
    assert computes_in("coco:base", platform="gpu", saved=saved) == "float32"
    asked = "--config.model.dtype=bfloat16"
    assert computes_in("coco:base", asked, platform="gpu", saved=saved) == "bfloat16"


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16")])
def test_a_model_that_is_built_without_a_command_asks_the_device_too(monkeypatch, platform, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    config = Config(tiny.config_dict(model__dtype="auto").to_dict())
    assert TransformerOptions.from_config(config.model).dtype == jnp.dtype(dtype)
