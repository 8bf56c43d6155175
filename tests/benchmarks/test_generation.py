"""What `bench --inference` compares: the same texts in every exact way, and what it counts."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from unified_mm.benchmarks import generation, requests
from unified_mm.benchmarks.generation import (
    Way,
    costs,
    lengthened,
    step_bytes,
    ways,
    write_function,
)
from unified_mm.data.records import Record, Text
from unified_mm.inference.decoding import Decoding

FUSIONS = ("early", "gated_cross_attention")


@pytest.fixture(scope="module")
def models():
    return {name: tiny.loaded(model__fusion=name) for name in FUSIONS}


@pytest.fixture(scope="module")
def model(models):
    return models["early"]


@pytest.fixture(scope="module")
def views():
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)


def write(way, views, room=11):
    predictor = way.model.predictor
    inputs = generation._inputs(predictor, 4, room, views[:4], way.model.task.tokenizer.eos_id)
    with predictor.on_mesh():
        run = jax.jit(write_function(way, room))
        return jax.device_get(run(predictor.params, predictor.to_device(inputs)))


@pytest.mark.parametrize(
    "fusion", ["early", pytest.param("gated_cross_attention", marks=pytest.mark.slow)]
)
def test_reading_everything_anew_writes_what_the_cache_does(models, views, fusion):
    cached, anew = (write(Way("", models[fusion], kept), views) for kept in (True, False))
    np.testing.assert_array_equal(cached[0], anew[0])
    np.testing.assert_allclose(cached[1], anew[1], atol=1e-3)
    assert len({tuple(row) for row in cached[0]}) > 1


def test_the_ways_are_those_that_the_table_names(model):
    found = list(ways(model))
    names = ["baseline", "bfloat16", "cache, float32", "cache", "+ chunked", "+ int8 weights",
             "+ int8 cache", "all"]  # fmt: skip
    assert [way.name for way in found] == names
    assert [way.cached for way in found] == [False, False] + [True] * 6
    options = {way.name: way.model.task.model.options for way in found}
    assert options["+ chunked"].attention == "chunked" and options["baseline"].attention == "xla"
    assert options["all"].cache == options["+ int8 cache"].cache == "int8"
    assert options["all"].dtype == options["cache"].dtype == jax.numpy.bfloat16
    kinds = {
        way.name: {leaf.dtype.name for leaf in jax.tree.leaves(way.model.predictor.params)}
        for way in found
    }
    assert kinds["baseline"] == {"float32"} and kinds["cache"] == {"bfloat16"}
    assert "int8" in kinds["+ int8 weights"] and "int8" in kinds["all"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_longer_texts_than_the_model_reads_can_be_timed(models, fusion):
    model = models[fusion]
    assert lengthened(model, 12) is model
    longer = lengthened(model, 33)
    assert longer.task.modalities["text"].length == 33
    way = Way("cache", model, True)
    if fusion == "early":
        row = costs(way, 2, 32, 2)
        assert row["tokens_per_second"] > 0 and row["p95_ms"] >= row["p50_ms"] > 0
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.predictor.params))
        assert row["weight_bytes"] == weights < row["peak_bytes"]
    else:
        predictor = longer.predictor
        inputs = predictor.to_device(generation._inputs(predictor, 2, 32))
        with predictor.on_mesh():
            row = step_bytes(replace(way, model=longer), inputs, 32)
    options, stack = model.task.model.options, model.predictor.params["transformer"]
    slots = 1 + 32 + (4 if fusion == "early" else 0)
    kept = 2 * 2 * options.layers * slots * options.width * 4
    assert row["cache_bytes"] >= kept
    assert row["decode_step_reads_bytes"] >= row["cache_bytes"] + sum(
        leaf.nbytes for leaf in jax.tree.leaves(stack)
    )


def test_quality_is_that_of_the_captions(model, views, tmp_path, monkeypatch):
    """Of the same captions as the model writes, against each image's own."""
    records, given = [], []
    for number, view in enumerate(views):
        Image.fromarray(view).save(tmp_path / f"{number}.png")
        text = Text("", f"caption {number}")
        records.append(Record(number, {"image": str(tmp_path / f"{number}.png")}, (text,), True))
    monkeypatch.setattr(generation, "QUALITY_BATCH", 4)  # so that the last batch is not full
    monkeypatch.setattr(
        generation, "caption_scores", lambda *each: given.append(each) or {"cider_d": 1.5}
    )
    assert generation.caption_quality(Way("", model, True), records) == 1.5
    assert given == [(model.caption(views), [[f"caption {n}"] for n in range(6)])]


def test_every_client_gets_its_text_in_each_way_of_serving(model, views):
    lines = []
    load = {"count": 12, "clients": 4, "slots": 2}
    rows = requests.request_table(model, list(views), **load, say=lines.append)
    assert [row["name"] for row in rows] == ["one at a time", "static batches", "continuous"]
    assert all(row["equal_texts"] == 12 for row in rows)
    assert all(row["requests_per_second"] > 0 for row in rows) and len(lines) == 3


def test_a_request_that_fails_is_told(model, views):
    asked = requests.make_requests(model, list(views), 3)

    def broken(_):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        requests.load(broken, asked, 2)
    assert all(isinstance(each.decoding, Decoding) for each in asked)
