"""Shares and rollout of attention against loops over tokens, layers and heads."""

import numpy as np
import pytest

from unified_mm.analysis.attention_flow import between_modalities, rollout, shares, stack_layers
from unified_mm.nn.sow import Weights
from unified_mm.nn.tokens import Group

GROUPS = (Group("image", "image", 3), Group("captioning", "text", 4))


def weights(seed=0, periods=2, rows=2, heads=2):
    """Random attention of seven tokens in which the last sees nothing."""
    values = np.random.default_rng(seed).random((periods, rows, heads, 7, 7))
    values[..., :3, 3:] = 0
    values[..., 6, :] = 0
    sums = values.sum(-1, keepdims=True)
    values = (values / np.where(sums, sums, 1)).astype(np.float32)
    return Weights(values, GROUPS, GROUPS)


def test_shares_by_layer_and_head():
    found = weights()
    counted = np.array([[True, True, False, True], [True, False, False, True]])
    for mask, places in ((None, [[0, 1, 2], [0, 1, 2]]), (counted, [[0, 1], [0]])):
        # The last text token sees nothing, and is left out.
        for layer in range(2):
            for head in range(2):
                given = [
                    found.values[layer, row, head, 3 + place, :3].sum()
                    for row in range(2)
                    for place in places[row]
                ]
                share = shares(found, "captioning", "image", mask)[layer, head]
                assert share == pytest.approx(np.mean(given), abs=1e-6)
    named = {"transformer/layers/block_0/attention": found}
    all_of_them = between_modalities(named, ("image", "captioning"), {})
    np.testing.assert_allclose(all_of_them["image to image"], 1, atol=1e-6)
    np.testing.assert_allclose(all_of_them["image to captioning"], 0, atol=1e-6)
    both = all_of_them["captioning to image"] + all_of_them["captioning to captioning"]
    np.testing.assert_allclose(both, 1, atol=1e-6)
    with pytest.raises(ValueError, match="no token group 'sound' among the keys: image"):
        shares(found, "image", "sound")


def test_layers_come_in_the_order_of_the_model():
    first, second = weights(1), weights(2)
    found = stack_layers(
        {
            "transformer/layers/block_1/attention": second,
            "transformer/layers/block_0/attention": first,
            "transformer/layers/cross/attention": weights(3),
            "towers_image/layers/block_0/attention": weights(4),
        }
    )
    expected = [first.values[0], second.values[0], first.values[1], second.values[1]]
    np.testing.assert_array_equal(found, np.stack(expected))
    with pytest.raises(ValueError, match="no self-attention of 'towers_sound'"):
        stack_layers({"transformer/layers/block_0/attention": first}, "towers_sound")


def test_rollout_is_the_product_of_its_layers():
    layers = stack_layers({"transformer/layers/block_0/attention": weights()})
    found = rollout(layers)
    for row in range(2):
        flow = np.eye(7)
        for layer in layers:
            half = np.zeros((7, 7))
            for n in range(7):
                mean = np.mean([layer[row, head, n] for head in range(2)], axis=0)
                half[n] = 0.5 * mean
                half[n, n] += 0.5
            half[6, 6] = 1.0  # it sees nothing
            flow = half @ flow
        np.testing.assert_allclose(found[row], flow, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    assert found[0, 6].tolist() == np.eye(7)[6].tolist()
    assert not found[:, :3, 3:].any()


def test_tokens_that_see_only_themselves_stay_themselves():
    itself = np.broadcast_to(np.eye(4, dtype=np.float32), (3, 1, 2, 4, 4))
    np.testing.assert_array_equal(rollout(itself)[0], np.eye(4))
