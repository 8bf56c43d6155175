"""A run that starts from the weights of others has them, layer by layer, wherever they lie."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import unified_mm
from unified_mm.config import Config
from unified_mm.data.sources import open_source
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.evaluation.evaluate import Split, check_split
from unified_mm.parallel.sharding import path_of
from unified_mm.task import build_task
from unified_mm.training import start_from
from unified_mm.training.start_from import (
    config_from_run,
    load_params,
    news_of_start,
    weights_to_start_from,
)

RECIPE = f"--config={Path(__file__).parents[2] / 'configs' / 'coco.py'}:tiny"

LATE = {
    "model__fusion": "late",
    "model__layers": 4,
    "model__norm": "rms",
    "model__activation": "quick_gelu",
    "model__query_bias": False,
    "model__output_bias": False,
    "model__feed_forward_bias": False,
    "model__tower__width": 8,
    "model__modalities__image__stem": "hierarchical",
    "objectives__captioning__weight": 0.0,
    "objectives__matching__weight": 0.0,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two towers of four layers, with options of their own: the run's folder, and its weights."""
    params = tiny.params(tiny.task(**LATE))
    folder = tmp_path_factory.mktemp("runs") / "late"
    return tiny.write_run(folder, tiny.config_dict(**LATE), params), flat(params)


@pytest.fixture(scope="module")
def late(written):
    return written[0]


@pytest.fixture(scope="module")
def theirs(written):
    return written[1]


def adopted(**changes):
    config = tiny.config_dict(
        objectives__matching__weight=0.0,
        model__resampler__latents=3,
        model__resampler__layers=1,
        **changes,
    )
    return config_from_run(config, ())


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


def begun(config):
    """Parameters with the weights that a config names, by path; those that are new as drawn."""
    fields = Config(config.to_dict())
    tokenizer = TextTokenizer.load(config.data.tokenizer, **fields.data.special_tokens)
    own = tiny.params(build_task(fields, tokenizer), seed=1)
    return flat(load_params(own, fields, weights_to_start_from(fields))), flat(own)


def test_both_parts_lie_where_another_stack_has_them(late, theirs):
    """Four layers in a row become two periods of a cross layer and two blocks."""
    config = adopted(
        model__fusion="gated_cross_attention",
        model__cross__every=2,
        model__start_from__text=str(late),
        model__start_from__image=str(late),
    )
    params, own = begun(config)
    assert (config.model.layers, config.model.norm) == (4, "rms")
    assert (config.model.tower.width, config.model.tower.activation) == (8, "quick_gelu")
    name = "transformer/layers/block_{}/feed_forward/mlp/shared/up/kernel"
    for layer in range(4):
        np.testing.assert_array_equal(
            params[name.format(layer % 2)][layer // 2], theirs[name.format(0)][layer]
        )
    same = [path for path in params if path.startswith(("towers_image/", "embedders_"))]
    for path in same:
        np.testing.assert_array_equal(params[path], theirs[path], err_msg=path)
    assert len(same) > 10
    for path in (path for path in params if path.startswith("transformer/layers/cross/")):
        np.testing.assert_array_equal(params[path], own[path], err_msg=path)


def test_text_alone_starts_early_fusion(late, theirs):
    config = adopted(model__start_from__text=str(late))
    params, _ = begun(config)
    for path in params:
        if path.startswith(("transformer/", "embedders_text/")):
            np.testing.assert_array_equal(params[path], theirs[path], err_msg=path)
    assert (params["embedders_image/patches/kernel"].shape[1]) == config.model.width
    gridded = adopted(model__start_from__text=str(late), model__sparse={"image": {"grid": 1}})
    assert gridded.model.sparse.image.grid == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"start_from__image": "{late}"}, "early fusion has no image tower"),
        ({"start_from__text": "{late}/nowhere"}, "is no run"),
    ],
)
def test_weights_that_have_no_place_are_refused(late, changes, named):
    filled = {f"model__{k}": v.format(late=late) for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        config_from_run(tiny.config_dict(**filled), ())


def test_a_field_that_contradicts_the_weights_is_refused(late):
    config = tiny.config_dict(model__start_from__text=str(late), model__layers=3)
    with pytest.raises(ValueError, match="model.layers=3, but the weights of model.start_from"):
        config_from_run(config, ("model.layers",))
    assert config_from_run(config, ()).model.layers == 4
    assert isinstance(config_from_run(config, ()), ConfigDict)
    saved = json.loads((late / "config.json").read_text())
    assert (
        config_from_run(config, ()).data.special_tokens.to_dict() == saved["data"]["special_tokens"]
    )


def test_a_field_of_a_tower_that_contradicts_the_weights_is_refused(clip):
    config = tiny.config_dict(
        model__fusion="late",
        model__start_from__image=str(clip),
        model__tower__layers=3,
        model__tower__attention="chunked",
    )
    with pytest.raises(ValueError, match=r"model.tower.layers=3, but the weights .* have 1"):
        config_from_run(config, ("model.tower.layers",))
    found = config_from_run(config, ("model.tower.attention",)).model.tower
    assert found.layers == 1 and found.attention == "chunked"


def test_layers_are_counted_by_stack():
    """The periods of one may be of two blocks, and those of another of one."""
    leaves = {
        "transformer/layers/block_0/x": np.arange(0, 6, 2),
        "transformer/layers/block_1/x": np.arange(1, 6, 2),
        "towers_image/layers/block_0/x": np.arange(10, 13),
    }
    found = start_from._by_layer(leaves)
    assert {path: int(leaf) for path, leaf in found.items()} == {
        **{f"transformer/layers/{layer}/x": layer for layer in range(6)},
        **{f"towers_image/layers/{layer}/x": 10 + layer for layer in range(3)},
    }


CLIP = {
    "model__fusion": "late",
    "model__activation": "quick_gelu",
    "model__norm_epsilon": 1e-5,
    "model__tower__width": 8,
    "model__tower__layers": 1,
    "model__modalities__image__class_token": True,
    "model__modalities__image__norm": True,
    "model__modalities__image__mean": [0.4, 0.5, 0.6],
    "model__modalities__text__scaled": False,
    "data__fit": "crop_resized",
    "objectives__contrastive__rule": "separate_causal",
    "objectives__contrastive__pool": "first",
    "objectives__contrastive__text_pool": "last",
    "objectives__contrastive__bound_scale": False,
    "objectives__captioning__weight": 0.0,
    "objectives__matching__weight": 0.0,
}
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two towers with heads, rules and preprocessing as CLIP has them; the scale above 100."""
    params = tiny.params(tiny.task(**CLIP))
    params["heads_contrastive"]["log_scale"] = jax.numpy.float32(5.0)
    folder = tmp_path_factory.mktemp("runs") / "clip"
    return tiny.write_run(folder, tiny.config_dict(**CLIP), params)


def test_a_whole_model_goes_on_as_it_is(clip, tmp_path, monkeypatch, capsys):
    """A step at (nearly) no learning rate leaves every embedding, the scale, the loss's form."""
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    data = tiny.write_coco(tmp_path / "coco")
    arguments = [
        f"--config.data.dir={data}",
        f"--config.model.start_from.whole={clip}",
        "--config.model.unroll=1",
        "--config.logging.tensorboard=False",
        "--config.train.steps=1",
        "--config.train.batch_size=8",
        "--config.train.learning_rate=1e-30",
        "--config.evaluation.batch_size=8",
    ]
    commands.train(RECIPE, f"--workdir={tmp_path / 'run'}", *arguments)
    said = capsys.readouterr().out
    assert f"starts with whole from {clip}; afresh: nothing\n" in said
    assert "objectives.captioning.weight=0: 'late' fusion cannot serve it" in said
    before, after = unified_mm.load(clip), unified_mm.load(tmp_path / "run")
    assert after.step == 1
    for name in ("embed_images", "embed_texts"):
        given = PICTURES if name == "embed_images" else tiny.TEXTS
        one, other = (np.asarray(getattr(each, name)(list(given))) for each in (before, after))
        np.testing.assert_array_equal(one, other)
    assert float(after.params["heads_contrastive"]["log_scale"]) == 5.0
    for field in ("rule", "loss", "width", "pool", "text_pool", "bound_scale"):
        assert (
            after.config.objectives.contrastive[field]
            == before.config.objectives.contrastive[field]
        )
    assert after.config.data.fit == "crop_resized"


def test_heads_that_a_whole_model_does_not_have_start_afresh_and_are_named(late, theirs):
    config = config_from_run(tiny.config_dict(model__start_from__whole=str(late)), ())
    assert config.model.fusion == "late" and config.model.tower.width == 8
    config.objectives.contrastive.weight = 0.0
    config.objectives.more = dict(config.objectives.contrastive.to_dict(), weight=1.0)
    config.objectives.captioning.weight = config.objectives.matching.weight = 0.0
    fields = Config(config.to_dict())
    own = tiny.params(build_task(fields, tiny.tokenizer()), seed=1)
    found = weights_to_start_from(fields)
    assert news_of_start(own, fields, found).endswith(
        "afresh: heads_more; left out: heads_contrastive"
    )
    params = flat(load_params(own, fields, found))
    for path, leaf in params.items():
        expected = flat(own)[path] if path.startswith("heads_more/") else theirs[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "asked", "named"),
    [
        ({"start_from__text": "{clip}"}, (), "whole leaves nothing to model.start_from.text"),
        (
            {"width": 8},
            ("model.width",),
            "model.width=8, but the weights of model.start_from.whole",
        ),
        (
            {"modalities__image__patch": 4},
            ("model.modalities.image.patch",),
            "image.patch=4, but the weights",
        ),
    ],
    ids=("two", "width", "patch"),
)
def test_what_contradicts_a_whole_model_is_refused(clip, changes, asked, named):
    filled = {
        f"model__{k}": v.format(clip=clip) if isinstance(v, str) else v for k, v in changes.items()
    }
    config = tiny.config_dict(model__start_from__whole=str(clip), **filled)
    with pytest.raises(ValueError, match=named):
        config_from_run(config, asked)


def test_exits_may_be_added_to_a_whole_model(late):
    config = tiny.config_dict(model__start_from__whole=str(late), model__exits=(1,))
    assert tuple(config_from_run(config, ("model.exits",)).model.exits) == (1,)


def test_exits_of_a_whole_model_are_not_taken_over(late, tmp_path):
    run = shutil.copytree(late, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["exits"] = [1]
    saved["objectives"]["exits"]["weight"] = 1.0
    (run / "config.json").write_text(json.dumps(saved))
    config = config_from_run(tiny.config_dict(model__start_from__whole=str(run)), ())
    assert not config.model.exits and config.objectives.exits.weight == 0


def test_the_length_of_texts_is_free_but_where_padding_is_seen(clip):
    config = tiny.config_dict(model__start_from__whole=str(clip))
    config.model.modalities.text.length = 9
    length = "model.modalities.text.length"
    assert config_from_run(config, ()).model.modalities.text.length == 12
    found = config_from_run(config, (length,)).model.modalities.text
    assert (found.length, found.max_positions) == (9, 12)


def test_a_captioner_without_a_begin_token_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """And may be given one, as a model whose texts had none is."""
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    built = tiny.config_dict(objectives__matching__weight=0.0)
    built.data.special_tokens.bos = ""
    task = tiny.task(objectives__matching__weight=0.0)
    run = tiny.write_run(tmp_path / "run", built, tiny.params(task))
    bos = "data.special_tokens.bos"
    config = tiny.config_dict(model__start_from__text=str(run), data__special_tokens__bos="<eos>")
    assert config_from_run(config, (bos,)).data.special_tokens.bos == "<eos>"
    assert config_from_run(config, ()).data.special_tokens.bos == ""
    config.data.special_tokens.eos = "<bos>"
    with pytest.raises(ValueError, match="special_tokens.eos='<bos>', but the weights"):
        config_from_run(config, ("data.special_tokens.eos",))
    data = tiny.write_coco(tmp_path / "coco")
    config.data.dir = str(data)
    split = open_source(Config(config.to_dict()).data).manifest("val")
    begun = replace(task, tokenizer=TextTokenizer.load(run / "tokenizer.json", bos=""))
    check_split(Split(split), task)
    with pytest.raises(ValueError, match="no begin token.* name one"):
        check_split(Split(split), begun)
