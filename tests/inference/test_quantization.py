"""Models with int8 weights: what becomes int8, and what comes of it, in every fusion."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.inference.quantization import quantized
from unified_mm.inference.quantized_params import (
    dequantized,
    saved_shapes,
    trace,
    weight_bytes,
)
from unified_mm.models.gated import GatedCrossAttention
from unified_mm.nn.attention.rules import View
from unified_mm.nn.quantized import Quantized
from unified_mm.objectives.captioning import Captioning
from unified_mm.parallel.sharding import path_of, without_names

STREAM = View("captioning", "prefix")
GATED = {
    "model__fusion": "gated_cross_attention",
    "model__layers": 4,
    "model__cross__every": 2,
    "model__resampler__latents": 3,
    "model__resampler__layers": 1,
    "model__resampler__heads": 2,
    "model__resampler__head_width": 4,
    "model__resampler__feed_forward": 8,
}
KINDS = {
    "early": {},
    "gated": GATED,
    "late": {"model__fusion": "late", "objectives__captioning__weight": 0.0},
    "per modality": {"model__separate_attention": True, "model__separate_feed_forward": True},
    "own head": {"model__modalities__text__head": "own", "objectives__contrastive__weight": 0.0},
}


def built(kind):
    changes = {"objectives__matching__weight": 0.0, **KINDS[kind]}
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes).to_dict())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), config, 7)


@cache
def all_three(kind):
    """A model, with int8 weights, and with int8 activations too."""
    model = built(kind)
    return model, quantized(model), quantized(model, activations="int8")


@pytest.fixture(
    params=["early", "late"]
    + [
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
        if kind not in ("early", "late")
    ]
)
def models(request):
    return all_three(request.param)


@pytest.fixture
def early():
    return all_three("early")


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def by_path(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return {path_of(path): leaf for path, leaf in leaves}


def contracted(path, ndim):
    """Axes that are summed over, by the names that our layers have."""
    if path.endswith(("/tokens", "/scores")):
        return (1,)
    stacked = "/layers/" in path
    if "/output/" in path:
        return (1, 2) if stacked else (0, 1)
    return (1,) if stacked else (0,)


def test_dense_maps_and_tables_are_int8_with_a_scale_for_each_channel_and_layer(models):
    model, small, _ = models
    before, after = by_path(model.params), by_path(small.params)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        if not path.endswith(("/kernel", "/tokens", "/scores")):
            np.testing.assert_array_equal(leaf, before[path])
            continue
        floats = np.asarray(before[path])
        axes = contracted(path, floats.ndim)
        scale = np.abs(floats).max(axes, keepdims=True) / 127.5
        assert leaf.values.dtype == jnp.int8 and leaf.scale.dtype == jnp.float32
        np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
        exact = floats / scale
        settled = np.abs(exact - np.floor(exact) - 0.5) > 1e-3  # one half goes either way
        values = np.clip(np.rint(exact), -128, 127)
        np.testing.assert_array_equal(np.asarray(leaf.values)[settled], values[settled])
        assert np.abs(leaf.floats() - floats).max() <= 0.501 * scale.max()
    assert small.config.quantized.weights == "int8" and small.step == 7


def outputs(predictor):
    """What the model can be asked for, as float arrays.

    Of a gated model not the embeddings: they go through nothing that other models do not have.
    """
    batch = jax.tree.map(np.asarray, tiny.batch(predictor.task))
    found = {}
    if predictor.can_retrieve() and not isinstance(predictor.task.model, GatedCrossAttention):
        found |= {
            "images": predictor.embed(batch, "image"),
            "texts": predictor.embed(batch, "text"),
        }
    if predictor.can(Captioning):
        found["likelihood"] = predictor.log_likelihood(batch)[:, 0]
    return found


def test_a_scan_computes_with_what_the_weights_stand_for_and_stays_near_the_floats(models):
    model, small, both = models
    stood_for = outputs(model.predictor.at(dequantized(small.predictor.params)))
    floats, got, with_both = map(outputs, (model.predictor, small.predictor, both.predictor))
    assert floats
    for name, want in floats.items():
        np.testing.assert_allclose(got[name], stood_for[name], rtol=1e-4, atol=1e-5, err_msg=name)
        size = np.linalg.norm(want)
        assert 0 < np.linalg.norm(got[name] - want) < 0.04 * size, name
        assert 0 < np.linalg.norm(with_both[name] - want) < 0.06 * size, name


@pytest.mark.parametrize(
    ("kind", "activations"),
    [("early", ""), ("gated", "int8")],
)
def test_the_cache_gives_what_reading_all_again_gives(kind, activations):
    _, weights, both = all_three(kind)
    small = both if activations else weights
    batch = tiny.batch(small.task)
    batch["text"]["valid"] = jnp.ones_like(batch["text"]["valid"])
    text, split = batch["text"], 10

    def whole(module):
        return module.logits(module.encode(batch, (STREAM,))[STREAM.name].text)

    def cached(module):
        begin = {**batch, "text": jax.tree.map(lambda x: x[:, :split] if x.ndim > 1 else x, text)}
        rest = jax.tree.map(lambda x: x[:, split:] if x.ndim > 1 else x, text)
        places = jnp.arange(split, text["ids"].shape[1])
        first, cache = module.prefill(begin, STREAM, len(places))
        rest["text_position"] = jnp.broadcast_to(places, rest["ids"].shape)
        second, _ = module.extend(cache, rest, STREAM)
        return module.logits(jnp.concatenate([first, second], axis=1))

    def logits(of, *ways):
        found = jax.jit(
            lambda params: [of.task.model.apply({"params": params}, method=way) for way in ways]
        )(of.params)
        return [np.where(np.asarray(x) > -1e8, x, 0.0) for x in found]

    want, got = logits(small, whole, cached)
    if activations:
        # A sum in another order may round one the other way, and with it all that follows: at most
        # they differ as two independent roundings do. A wrong cache is off by many times that.
        (unrounded,) = logits(weights, whole)
        assert np.linalg.norm(got - want) < 2**0.5 * np.linalg.norm(want - unrounded)
    else:
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def products(model):
    """Lines of the program that scores captions, one for each product in it."""
    batch = tiny.batch(model.task)

    def read(module):
        return module.logits(module.encode(batch, (STREAM,))[STREAM.name].text)

    lowered = jax.jit(lambda p: model.task.model.apply({"params": p}, method=read)).lower(
        model.params
    )
    return [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]


def test_with_int8_activations_every_product_with_weights_is_of_int8(early):
    model, small, both = early
    lines = products(both)
    whole = [line for line in lines if line.count("xi8>") == 2 and "xi32>" in line.split("->")[1]]
    # Patches; query, key, value, output, up and down of the layer that is scanned; the logits.
    assert len(whole) == 1 + 6 + 1
    assert not any("xi8>" in line for line in products(small))
    # What is left are queries with keys, and values by their weights.
    assert len(lines) - len(whole) == len(products(model)) - (1 + 6 + 1)


def test_bytes_are_counted(early):
    model, small, _ = early
    floats, int8 = weight_bytes(model.params), weight_bytes(small.params)
    assert floats == {"all": 4 * sum(x.size for x in jax.tree.leaves(model.params)), "int8": 0}
    rounded = [leaf for leaf in by_path(small.params).values() if is_quantized(leaf)]
    assert int8["int8"] == sum(leaf.values.size for leaf in rounded)
    scales = 4 * sum(leaf.scale.size for leaf in rounded)
    assert int8["all"] == floats["all"] - 3 * int8["int8"] + scales < 0.5 * floats["all"]


@pytest.mark.parametrize(
    ("changes", "chooses"),
    [
        ({"model__dropping__keep": 0.5}, "scorer/"),
        ({"model__feed_forward_type": "neurons", "objectives__neurons__weight": 1.0}, "/of_image/"),
        ({"model__feed_forward_type": "experts", "objectives__matching__weight": 0.0}, "/router_"),
    ],
)
def test_kernels_that_choose_stay_floats(changes, chooses):
    task = tiny.task(**changes)
    assert any(chooses in path for path in trace(task, floats=())[1])
    assert not any(chooses in path for path in trace(task)[1])


def test_what_a_checkpoint_holds_is_known_without_it(models):
    model, _, small = models
    shapes = without_names(saved_shapes(model.task, small.config))
    alike = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, small.params
    )
    assert all(jax.tree.leaves(alike))
    assert jax.tree.structure(shapes) == jax.tree.structure(small.params)


def test_what_cannot_be_is_refused(early, monkeypatch):
    model = early[0]
    with pytest.raises(ValueError, match="weights='int4': one of int8"):
        quantized(model, weights="int4")
    with pytest.raises(ValueError, match="activations='none': 'int8', or '' for none"):
        quantized(model, activations="none")
    small = quantized(model, activations="int8", source="runs/first")
    with pytest.raises(ValueError, match="are int8 already: quantise the run .* .runs/first"):
        quantized(small)
    monkeypatch.setitem(sys.modules, "qwix", None)
    for work in (lambda: quantized(model), lambda: saved_shapes(model.task, small.config)):
        with pytest.raises(ValueError, match=r"qwix is not installed.*unified_mm\[quantize\]'"):
            work()


def print_memory():
    """Bytes beside the arguments that writing takes, with float weights and with int8 ones."""
    from unified_mm.inference.decoding import GREEDY
    from unified_mm.inference.generate import TextWriter
    from unified_mm.inference.predictor import inputs_of, write_texts

    width, layers = 128, 8
    changes = {
        "model__width": width,
        "model__layers": layers,
        "model__feed_forward": 4 * width,
        "objectives__matching__weight": 0.0,
    }
    task = tiny.task(**changes)
    config = Config(tiny.config_dict(**changes, model__unroll=layers).to_dict())
    model = LoadedModel(task, tiny.params(task), one_device_mesh(), config, 0)
    small = quantized(replace_model_of(model, unroll=layers))
    batch = jax.tree.map(jnp.asarray, task.example_batch(1))
    batch["text"] = {name: batch["text"][name][..., :1] for name in ("ids", "valid")}
    batch["text"]["present"] = jnp.ones(1, bool)
    inputs = inputs_of(GREEDY, batch, np.array([8]), [5], 0)
    for each in (model, small):
        writer = TextWriter(each.task.model, STREAM, padding=0, cache_room=8)
        write = jax.jit(partial(write_texts, writer, beams=1, samples=1))
        memory = write.lower(each.params, inputs).compile().memory_analysis()
        print(memory.temp_size_in_bytes)
    print(4 * 12 * width * width, 4 * width * task.modalities["text"].vocabulary)


def replace_model_of(model, **options):
    """The loaded model, its transformers with other options."""
    task = tiny.replace_model(model.task, **options)
    return LoadedModel(task, model.params, model.predictor.mesh, model.config, model.step)


@pytest.mark.slow
def test_the_loop_that_writes_never_holds_floats_of_all_weights():
    """Compiled with optimizations, which the suite goes without: these are what moves code."""
    tests = Path(__file__).parents[1]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    }
    paths = [str(tests), str(tests / "inference"), str(tests.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-c", "import test_quantization as t; t.print_memory()"],
        env=environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    floats, int8, layer, table = map(int, done.stdout.split())
    # Of eight layers, the floats of one are there at a time, and those of the table.
    assert int8 - floats < 1.5 * layer + table
