"""InfoNCE and sigmoid pairs against NumPy written out, in blocks of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.objectives.pair_losses import LOSSES, compare_all, largest_divisor

SCALE, BIAS = 3.0, -0.5


def info_nce(logits):
    """Radford et al. 2021, figure 3: cross-entropy over rows and over columns, halved."""
    losses = []
    for i in range(len(logits)):
        to_text = -np.log(np.exp(logits[i, i]) / np.exp(logits[i]).sum())
        to_image = -np.log(np.exp(logits[i, i]) / np.exp(logits[:, i]).sum())
        losses.append((to_text + to_image) / 2)
    return np.array(losses)


def sigmoid_pairs(logits):
    """Zhai et al. 2023, equation 1: -1/|B| sum_i sum_j log 1 / (1 + exp(z_ij (-t x.y + b)))."""
    losses = np.zeros(len(logits))
    for i in range(len(logits)):
        for j in range(len(logits)):
            z = 1 if i == j else -1
            losses[i] += np.log(1 + np.exp(-z * logits[i, j]))
    return losses


ORACLES = {"softmax": info_nce, "sigmoid": sigmoid_pairs}


def compared(rows, columns, paired, loss, chunk):
    scale, bias = jnp.float32(SCALE), jnp.float32(BIAS)
    return compare_all(rows, columns, scale, bias, paired, loss=LOSSES[loss], chunk=chunk)


@pytest.mark.parametrize("loss", ORACLES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_losses_written_out_with_the_unpaired_taken_away(loss, data):
    size = 6
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    paired = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    chunk = data.draw(st.integers(0, size + 1))
    rows, columns = rng.normal(size=(2, size, 4)).astype(np.float32)
    columns[4] = columns[2]  # two texts alike: the first is the nearest
    logits = SCALE * rows.astype(np.float64) @ columns.T + BIAS
    there = np.ix_(paired, paired)
    found, right = map(
        np.asarray,
        compared(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(paired), loss, chunk),
    )
    np.testing.assert_allclose(found[paired], ORACLES[loss](logits[there]), rtol=1e-4, atol=1e-5)
    if paired.any():
        nearest = logits[there].argmax(1) == np.arange(paired.sum())
        np.testing.assert_array_equal(right[paired], nearest)


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("loss", ORACLES)
def test_gradients_in_blocks_are_those_of_the_whole_and_the_unpaired_get_none(loss, chunk):
    rng = np.random.default_rng(1)
    rows, columns = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    paired = jnp.array([True, True, False, True, False, True])

    def total(rows, columns, chunk):
        return jnp.where(paired, compared(rows, columns, paired, loss, chunk)[0], 0.0).sum()

    def written(rows, columns):
        logits = SCALE * rows[paired] @ columns[paired].T + BIAS
        if loss == "softmax":
            both = [jax.nn.log_softmax(logits, axis=axis).diagonal() for axis in (0, 1)]
            return -0.5 * sum(both).sum()
        signs = 2 * jnp.eye(len(logits)) - 1
        return jnp.log1p(jnp.exp(-signs * logits)).sum()

    found = jax.grad(total, argnums=(0, 1))(rows, columns, chunk)
    expected = jax.grad(written, argnums=(0, 1))(rows, columns)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert (one[~paired] == 0).all() and np.isfinite(one).all()


def without_alike(logits, alike):
    """The same logits; those of other examples of the same item are such that they add nothing."""
    return np.where(alike & ~np.eye(len(logits), dtype=bool), -1e9, logits)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("loss", ORACLES)
def test_examples_of_one_item_are_no_negatives_of_each_other(loss, chunk):
    rng = np.random.default_rng(2)
    rows, columns = rng.normal(size=(2, 6, 4)).astype(np.float32)
    rows[3], columns[3] = rows[0], 5 * rows[0]  # the same item, with a text that looks better
    records = np.array([7, 1, 2, 7, 4, 5], np.int32)
    ids = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [3, 4], [3, 9]], np.int32)
    alike = (records[:, None] == records) | (ids[:, None] == ids).all(-1)
    assert alike.sum() == 6 + 4
    paired = np.array([True, True, True, True, True, False])
    there = np.ix_(paired, paired)

    def losses(rows, columns):
        return compare_all(
            rows, columns, jnp.float32(SCALE), jnp.float32(BIAS), jnp.asarray(paired),
            loss=LOSSES[loss], chunk=chunk, items=(jnp.asarray(records), jnp.asarray(ids)),
        )  # fmt: skip

    (found, right), pull = jax.vjp(losses, jnp.asarray(rows), jnp.asarray(columns))
    logits = without_alike(SCALE * rows.astype(np.float64) @ columns.T + BIAS, alike)
    with np.errstate(over="ignore"):
        expected = ORACLES[loss](logits[there])
    np.testing.assert_allclose(found[paired], expected, rtol=1e-4, atol=1e-5)
    assert right[0] and right[3]
    assert all(np.isfinite(each).all() for each in pull((found, np.zeros(6, jax.dtypes.float0))))
    # Of two examples of one item there is nothing to tell apart.
    lone = jnp.asarray(records == 7) & jnp.asarray(paired)
    both, _ = compare_all(
        jnp.asarray(rows), jnp.asarray(columns), jnp.float32(SCALE), jnp.float32(BIAS), lone,
        loss=LOSSES["softmax"], chunk=chunk, items=(jnp.asarray(records),),
    )  # fmt: skip
    np.testing.assert_allclose(both[lone], 0, atol=2e-5)


@pytest.mark.parametrize("loss", ORACLES)
def test_the_matrix_of_all_pairs_is_never_there(loss):
    count, width = 96, 4
    vectors = jnp.ones((count, width))
    paired = jnp.ones(count, bool)

    def text(chunk):
        total = lambda x, y: compared(x, y, paired, loss, chunk)[0].sum()  # noqa: E731
        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(vectors, vectors).compile()
        return compiled.as_text()

    assert f"f32[{count},{count}]" in text(0)
    assert f"f32[{count},{count}]" not in text(8) and f"f32[{count},8]" in text(8)


@given(count=st.integers(1, 300), most=st.integers(1, 400))
def test_the_largest_divisor(count, most):
    found = largest_divisor(count, most)
    assert count % found == 0 and found <= most
    assert not [size for size in range(found + 1, min(count, most) + 1) if count % size == 0]
