"""Which rows each process reads: all of them, once, however devices are arranged."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.data.pipeline import training_batches
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.processes import own_rows, rows_by_process
from unified_mm.parallel.sharding import to_global


class Names:
    def prepare(self, record, rng):
        return {"record": np.array(record), "present": np.array(True)}

    def absent(self):
        return {"record": np.array(-1), "present": np.array(False)}


@settings(max_examples=25, deadline=None)
@given(
    processes=st.integers(1, 4),
    shards_each=st.integers(1, 3),
    rows_a_shard=st.integers(1, 3),
    copies=st.integers(1, 2),
    order=st.randoms(use_true_random=False),
)
def test_every_example_is_read_once_an_epoch(processes, shards_each, rows_a_shard, copies, order):
    places = [process for process in range(processes) for _ in range(shards_each)]
    order.shuffle(places)  # a torus lays devices out in its own order
    batch = rows_a_shard * len(places)
    held = rows_by_process(np.array([[place] * copies for place in places]), batch)
    assert sorted(np.concatenate(list(held.values())).tolist()) == list(range(batch))
    read = []
    for rows in held.values():
        records = range(3 * batch)
        batches = training_batches(records, {"a": Names()}, seed=1, batch_size=batch, rows=rows)
        read += [each["a"]["record"] for each in itertools.islice(batches, 3)]
        batches.close()
    assert sorted(np.concatenate(read).tolist()) == list(range(3 * batch))


def test_a_process_has_its_devices_rows_in_ascending_order():
    held = rows_by_process(np.array([[1], [0], [1], [0]]), 8)
    assert held[0].tolist() == [2, 3, 6, 7] and held[1].tolist() == [0, 1, 4, 5]


def test_processes_that_hold_the_same_rows_all_read_them():
    held = rows_by_process(np.array([[0, 1], [0, 1], [2, 3], [2, 3]]), 4)
    assert [held[p].tolist() for p in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("owners", "batch", "message"),
    [
        ([[0], [1]], 3, "batch of 3 cannot be split over 2 groups"),
        ([[0], [1]], 0, "batch of 0 cannot be split over 2 groups"),
        ([[0, 0], [0, 1], [1, 1]], 3, "process 1 would hold some rows .* but not all of them"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(owners, batch, message):
    with pytest.raises(ValueError, match=message):
        rows_by_process(np.array(owners), batch)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "tensor": 4}])
def test_one_process_reads_every_row_of_any_mesh(sizes):
    mesh = make_mesh(sizes)
    rows = own_rows(mesh, 16)
    assert rows.tolist() == list(range(16))
    placed = to_global({"row": rows}, mesh)["row"]
    np.testing.assert_array_equal(jax.device_get(placed), np.arange(16))
