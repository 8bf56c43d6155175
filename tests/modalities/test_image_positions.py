"""Positions of image patches: what they start as, written out, and what their lack means."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.modalities.image import ImageEmbedder, ImageEmbedding
from unified_mm.parallel.sharding import without_names

WIDTH = 8
GRID = (2, 3)  # patches of 4 pixels, down and across


def embedder(positions):
    return ImageEmbedder("image", ImageEmbedding(GRID, patch=4, positions=positions), WIDTH)


def batch(seed=0):
    pixels = np.random.default_rng(seed).uniform(0, 255, (2, 8, 12, 3)).astype(np.float32)
    return {"pixels": jnp.asarray(pixels), "present": jnp.ones(2, bool)}


def start(positions):
    params = without_names(jax.jit(embedder(positions).init)(jax.random.key(0), batch()))["params"]
    return np.asarray(params["positions"]), params


def waves(place, width):
    rates = [100 ** -(i / (width // 2 - 1)) for i in range(width // 2)]
    return [math.sin(place * r) for r in rates] + [math.cos(place * r) for r in rates]


def test_a_grid_tells_row_and_column():
    table, _ = start("grid")
    for row in range(2):
        for column in range(3):
            by_hand = waves(row, WIDTH // 2) + waves(column, WIDTH // 2)
            np.testing.assert_allclose(table[row, column], by_hand, atol=1e-6)


def test_a_line_tells_the_place_in_reading_order():
    table, _ = start("line")
    for place in range(6):
        by_hand = waves(place, WIDTH)
        np.testing.assert_allclose(table[place // 3, place % 3], by_hand, atol=1e-5)


def test_random_positions_are_as_large_as_sines_and_of_the_seed():
    table, _ = start("random")
    assert 0.5 < table.std() < 0.9
    np.testing.assert_array_equal(table, start("random")[0])


def test_without_positions_patches_have_no_order():
    """Patches that change places give the same tokens in other places."""
    module = embedder("none")
    params = without_names(jax.jit(module.init)(jax.random.key(0), batch()))["params"]
    assert "positions" not in params

    @jax.jit
    def tokens(pixels):
        given = {"pixels": pixels, "present": jnp.ones(2, bool)}
        return module.apply({"params": params}, given).embeddings

    pixels = batch()["pixels"]
    swapped = pixels.at[:, :4, :4].set(pixels[:, 4:, 8:]).at[:, 4:, 8:].set(pixels[:, :4, :4])
    order = jnp.array([5, 1, 2, 3, 4, 0])
    np.testing.assert_allclose(tokens(swapped), tokens(pixels)[:, order], atol=1e-6)


def test_other_words_are_refused():
    with pytest.raises(
        ValueError, match="image.positions='2d': must be one of grid, line, random, none"
    ):
        tiny.task(model__modalities__image__positions="2d")
