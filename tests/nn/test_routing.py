"""Choosing by room and order, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.nn.routing import choose, gather, into_blocks, scatter_add

ROWS, POOLS = 11, 3


def drawn(seed, ties=False):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(ROWS, POOLS)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    scores[rng.random(scores.shape) < 0.4] = -np.inf
    return scores, rng.random(ROWS) < 0.8


@pytest.mark.parametrize("room", [1, 3, ROWS, ROWS + 2])
@pytest.mark.parametrize("order", ["place", "score"])
@pytest.mark.parametrize("ties", [False, True])
def test_each_pool_takes_who_comes_first(room, order, ties):
    scores, valid = drawn(room, ties)
    found = np.asarray(jax.jit(choose, static_argnums=(1, 2))(scores, room, order, valid))
    for pool in range(POOLS):
        asking = [row for row in range(ROWS) if valid[row] and scores[row, pool] > -np.inf]
        if order == "score":
            asking.sort(key=lambda row, pool=pool: -scores[row, pool])  # stable
        taken = asking[:room]
        np.testing.assert_array_equal(found[pool], taken + [ROWS] * (room - len(taken)))


def test_by_place_no_row_depends_on_a_later_one():
    scores, valid = drawn(0)
    for row in range(ROWS):
        others = scores.copy()
        others[row:] = drawn(row + 1)[0][row:]
        one, other = (
            choose(jnp.asarray(each), 3, "place", jnp.asarray(valid)) for each in (scores, others)
        )
        np.testing.assert_array_equal(
            np.where(one < row, one, -1), np.where(other < row, other, -1)
        )


def test_slots_are_read_and_added_up():
    x = jnp.arange(8.0).reshape(4, 2)
    slots = jnp.array([[3, 4], [3, 0]])
    np.testing.assert_array_equal(gather(x, slots), [[x[3], [0, 0]], [x[3], x[0]]])
    y = jnp.ones((2, 2, 2)).at[0, 1].set(7.0)
    np.testing.assert_array_equal(scatter_add(y, slots, 4), [[1, 1], [0, 0], [0, 0], [2, 2]])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_blocks_hold_every_row_that_asks_once(size, most):
    rng = np.random.default_rng(size)
    order = rng.permuted(np.tile(np.arange(POOLS), (ROWS, 1)), axis=1)
    asked = (order < most) & (rng.random(ROWS) < 0.8)[:, None]
    slots, pools = into_blocks(jnp.asarray(asked), most, size)
    found = [
        (row, pool)
        for rows, pool in zip(slots.tolist(), pools.tolist(), strict=True)
        for row in rows
        if row < ROWS
    ]
    assert sorted(found) == [tuple(each) for each in np.argwhere(asked).tolist()]
