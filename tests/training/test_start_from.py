"""A run that starts from the weights of others has them, layer by layer, wherever they lie."""

import json
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import unified_mm
from unified_mm.config import Config
from unified_mm.parallel.sharding import path_of
from unified_mm.runs.folder import RunFolder
from unified_mm.training.setup import prepare
from unified_mm.training.start_from import adopt

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="module")
def late(tmp_path_factory, data):
    """Two towers of four layers, with options of their own."""
    workdir = tmp_path_factory.mktemp("runs") / "late"
    code = commands.run(
        f"--config={CONFIGS / 'coco.py'}:tiny",
        *commands.SMALL,
        "--config.model.fusion=late",
        "--config.model.layers=4",
        "--config.model.norm=rms",
        "--config.model.activation=quick_gelu",
        "--config.model.tower.width=8",
        "--config.train.steps=2",
        "--config.logging.tensorboard=False",
        f"--config.data.dir={data}",
        f"--workdir={workdir}",
    )
    assert code == 0
    return workdir


def started(data, tmp_path, **changes):
    config = tiny.config_dict(
        data__dir=str(data),
        data__cache_dir=str(tmp_path),
        objectives__matching__weight=0.0,
        model__resampler__latents=3,
        **changes,
    )
    adopted = adopt(config, ())
    folder = RunFolder(tmp_path / "run")
    setup = prepare(Config(adopted.to_dict()), folder, lambda _: None)
    with jax.set_mesh(setup.mesh):
        return adopted, flat(setup.make_state().params)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


def test_both_parts_lie_where_another_stack_has_them(late, data, tmp_path):
    """Four layers in a row become two periods of a cross layer and two blocks."""
    config, params = started(
        data,
        tmp_path,
        model__fusion="gated_cross_attention",
        model__cross__every=2,
        model__start_from__text=str(late),
        model__start_from__image=str(late),
    )
    theirs = flat(unified_mm.load(late).params)
    assert (config.model.layers, config.model.norm) == (4, "rms")
    assert (config.model.tower.width, config.model.tower.activation) == (8, "quick_gelu")
    name = "transformer/layers/block_{}/feed_forward/mlp/shared/up/kernel"
    for layer in range(4):
        np.testing.assert_array_equal(
            params[name.format(layer % 2)][layer // 2], theirs[name.format(0)][layer]
        )
    same = [
        path
        for path in params
        if path.startswith(("towers_image/", "embedders_"))
    ]
    for path in same:
        np.testing.assert_array_equal(params[path], theirs[path], err_msg=path)
    assert len(same) > 10
    assert (params["transformer/layers/cross/attention_gate"] == 0).all()


def test_text_alone_starts_early_fusion(late, data, tmp_path):
    config, params = started(data, tmp_path, model__start_from__text=str(late))
    theirs = flat(unified_mm.load(late).params)
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
        adopt(tiny.config_dict(**filled), ())


def test_a_field_that_contradicts_the_weights_is_refused(late):
    config = tiny.config_dict(model__start_from__text=str(late), model__layers=3)
    with pytest.raises(ValueError, match="model.layers=3, but the weights of model.start_from"):
        adopt(config, ("model.layers",))
    assert adopt(config, ()).model.layers == 4
    assert isinstance(adopt(config, ()), ConfigDict)
    saved = json.loads((late / "config.json").read_text())
    assert adopt(config, ()).data.special_tokens.to_dict() == saved["data"]["special_tokens"]
