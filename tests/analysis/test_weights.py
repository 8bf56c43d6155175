"""Norms, spectra and movement of a checkpoint's parameters."""

import jax
import numpy as np
import pytest
import tiny

from unified_mm.analysis.weights import (
    arrays_by_path,
    as_matrices,
    kept_steps,
    matrices,
    moved,
    norms,
    spectra,
    stable_rank,
)
from unified_mm.inference.loaded import load


@pytest.fixture(scope="module")
def model():
    return tiny.loaded()


def test_norms_are_of_each_layer(model):
    params = model.params
    found = norms(arrays_by_path(params))
    kernel = np.float64(
        params["transformer"]["layers"]["block_0"]["attention"]["query"]["shared"]["kernel"]
    )
    expected = [np.sqrt((kernel[layer] ** 2).sum()) for layer in range(2)]
    path = "transformer/layers/block_0/attention/query/shared/kernel"
    np.testing.assert_allclose(found[path], expected)
    table = np.float64(params["embedders_text"]["tokens"])
    np.testing.assert_allclose(found["embedders_text/tokens"], [np.linalg.norm(table)])
    assert len(found) == len(jax.tree.leaves(params))


def test_matrices_multiply_as_the_model_does(model):
    rng = np.random.default_rng(0)
    found = matrices(model)
    attention = model.params["transformer"]["layers"]["block_0"]["attention"]
    into, out = (np.float64(attention[name]["shared"]["kernel"]) for name in ("query", "output"))
    x, heads = rng.normal(size=(3, 16)), rng.normal(size=(3, 2, 8))
    path = "transformer/layers/block_0/attention/{}/shared/kernel"
    for layer in range(2):
        expected = np.einsum("nd,dha->nha", x, into[layer]).reshape(3, 16)
        np.testing.assert_allclose(x @ found[path.format("query")][layer], expected, atol=1e-9)
        expected = np.einsum("nha,had->nd", heads, out[layer])
        product = heads.reshape(3, 16) @ found[path.format("output")][layer]
        np.testing.assert_allclose(product, expected, atol=1e-9)
    table = np.float64(model.params["embedders_text"]["tokens"])
    np.testing.assert_allclose(found["embedders_text/tokens"][0], table.T)


def test_spectra_of_matrices_that_are_known():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
    values = np.array([5.0, 3.0, 1.0])
    known = (left[:, :3] * values) @ right[:3]
    stacked = np.stack([known, np.eye(6), np.zeros((6, 6))])
    found = spectra({"x": as_matrices(stacked, (-2,))})["x"]
    np.testing.assert_allclose(found[0], [5, 3, 1, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(stable_rank(found), [35 / 25, 6, 0], atol=1e-9)


def test_what_moved_between_two_checkpoints(tmp_path):
    config, task = tiny.config_dict(), tiny.task()
    first = tiny.params(task)
    second = jax.tree_util.tree_map_with_path(
        lambda path, x: 1.5 * x if "query" in str(path) else x, first
    )
    run = tiny.write_run(tmp_path / "run", config, first, step=7)
    tiny.write_run(run, config, second, step=9)
    assert kept_steps(str(run)) == (7, 9)
    before, after = (arrays_by_path(load(run, step=step).params) for step in (7, 9))
    found = moved(before, after)
    for path, value in found.items():
        expected = 0.5 if "query" in path else 0.0
        np.testing.assert_allclose(value, expected, atol=1e-6)
    assert found["transformer/layers/block_0/attention/query/shared/kernel"].shape == (2,)


def test_two_models_are_not_held_against_each_other():
    one = {"a": np.ones((1, 2)), "b": np.zeros((1, 2))}
    assert moved(one, {"a": np.ones((1, 2)), "b": np.ones((1, 2))})["b"].tolist() == [np.inf]
    assert moved(one, one) == {"a": [0.0], "b": [0.0]}
    with pytest.raises(ValueError, match="two models: only one of them has b"):
        moved(one, {"a": np.ones((1, 2))})
    with pytest.raises(ValueError, match="two models: a is .1, 2. in one and .1, 3."):
        moved(one, {**one, "a": np.ones((1, 3))})
