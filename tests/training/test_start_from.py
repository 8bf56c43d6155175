"""A run that starts from the weights of others has them, layer by layer, wherever they lie."""

import json

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from unified_mm.config import Config
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.folder import RunFolder
from unified_mm.task import build_task
from unified_mm.training.setup import prepare
from unified_mm.training.start_from import config_from_run, load_params, weights_to_start_from

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


def test_both_parts_lie_where_another_stack_has_them(late, theirs, tmp_path):
    """Four layers in a row become two periods of a cross layer and two blocks."""
    config = adopted(
        data__dir=str(tiny.write_coco(tmp_path / "coco")),
        data__cache_dir=str(tmp_path),
        model__fusion="gated_cross_attention",
        model__cross__every=2,
        model__start_from__text=str(late),
        model__start_from__image=str(late),
    )
    setup = prepare(Config(config.to_dict()), RunFolder(tmp_path / "run"), lambda _: None)
    with jax.set_mesh(setup.mesh):
        params = flat(setup.make_state().params)
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
    assert (params["transformer/layers/cross/attention_gate"] == 0).all()


def test_text_alone_starts_early_fusion(late, theirs):
    config = adopted(model__start_from__text=str(late))
    fields = Config(config.to_dict())
    tokenizer = TextTokenizer.load(config.data.tokenizer, **fields.data.special_tokens)
    own = tiny.params(build_task(fields, tokenizer), seed=1)
    params = flat(load_params(own, fields, weights_to_start_from(fields)))
    for path in params:
        if path.startswith(("transformer/", "embedders_text/")):
            np.testing.assert_array_equal(params[path], theirs[path], err_msg=path)
    assert (params["embedders_image/patches/kernel"].shape[1]) == config.model.width


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
