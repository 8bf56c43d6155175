"""Stems that are convolutional networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.convolution import (
    Depthwise,
    EfficientNetLite,
    NFNet,
    NormFree,
    lite_blocks,
    standardise,
)


@pytest.mark.parametrize(("side", "stride"), ((3, 1), (3, 2), (5, 2)))
@pytest.mark.parametrize("size", (8, 7))
def test_shifted_products_are_a_grouped_convolution(side, stride, size):
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(2, size, size, 4)))
    params = {"kernel": rng.normal(size=(side, side, 4)), "bias": rng.normal(size=4)}
    params = jax.tree.map(jnp.float32, params)
    expected = jax.lax.conv_general_dilated(
        x,
        params["kernel"][:, :, None],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    found = Depthwise(side, stride).apply({"params": params}, x)
    np.testing.assert_allclose(found, expected + params["bias"], rtol=1e-5, atol=1e-5)


def test_the_larger_ones_have_more_blocks_and_channels():
    assert len(lite_blocks()) == 16
    assert [block[1] for block in lite_blocks()][-2:] == [192, 320]
    assert len(lite_blocks(1.4, 1.8)) == 1 + 4 + 4 + 6 + 6 + 8 + 1
    assert lite_blocks(1.1)[1][1] == 24  # 26.4 is nearer to 24, and 24 is enough of it
    assert lite_blocks(1.4)[-1][1] == 448


def test_standardised_weights_keep_a_variance_of_one():
    kernel = 3 + 5 * np.random.default_rng(0).normal(size=(3, 3, 16, 8))
    found = np.asarray(standardise(jnp.float32(kernel))).reshape(-1, 8)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(found.var(0) * 144, 1, rtol=1e-4)


def test_what_a_norm_free_block_adds_has_a_variance_of_one():
    x = jnp.float32(np.random.default_rng(0).normal(size=(16, 8, 8, 32)))
    block = NormFree(32, 1, alpha=1.0, spread=1.0)
    params = block.init(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(block.apply({"params": params}, x), x)  # it begins as nothing
    added = block.apply({"params": {**params, "gain": jnp.ones(())}}, x) - x
    assert 0.6 < float(added.var()) < 1.4  # borders see zeros


def test_an_nfnet_halves_the_grid_before_and_in_each_stage():
    net = NFNet(channels=(8, 16), blocks=(1, 2))
    pixels = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    features, _ = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), pixels)
    assert (net.stride, features.shape) == (8, (4, 4, 4, 16))


@pytest.mark.parametrize(
    ("changes", "named"),
    (
        ({"stem": "nfnett"}, "Did you mean 'nfnet'.*Of patches alone: linear, hierarchical"),
        ({"stem": "nfnet"}, "a feature of its stem 'nfnet' stands for 16 pixels: set .*patch=16"),
        ({"stem": "nfnet", "stem_options": {"channel": 3}}, "image.stem_options.channel: NFNet"),
        ({"stem_options": {"alpha": 1.0}}, "stem_options: the stem 'linear' has none"),
        (
            {"stem": "nfnet", "stem_options": {"blocks": (1,)}, "patch": 16},
            "a number for each stage",
        ),
    ),
)
def test_what_is_no_stem_is_refused(changes, named):
    fields = {f"model__modalities__image__{name}": value for name, value in changes.items()}
    with pytest.raises(ValueError, match=named):
        tiny.task(**fields).abstract_params()


def test_a_stem_stands_in_a_model_that_takes_what_it_gives_before_its_head():
    options = {"channel_factor": 0.2, "depth_factor": 0.2}
    task = tiny.task(
        data__image_size=40,
        model__fusion="late",
        model__modalities__image__stem="efficientnet_lite",
        model__modalities__image__stem_options=options,
        model__modalities__image__patch=32,
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
    )
    params, batch = tiny.params(task), tiny.batch(task)["image"]
    stem = EfficientNetLite(**options)
    pixels = batch["pixels"] / 127.5 - 1
    features = stem.apply({"params": params["embedders_image"]["stem"]}, pixels)
    assert features.shape[1:3] == (2, 2)  # 40 pixels are two features of at most 32

    def embed(arrays):
        return task.embed(params, {"image": arrays}, "image")

    kept = {"features": features, "present": batch["present"]}
    np.testing.assert_allclose(jax.jit(embed)(kept), jax.jit(embed)(batch), atol=1e-5)
