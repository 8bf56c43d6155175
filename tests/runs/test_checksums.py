"""Checksums: against their definition in plain integers, and against the damage they must see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from unified_mm.runs import seal
from unified_mm.runs.seal import array_checksum, host_checksum, tree_checksums

MASK = 0xFFFFFFFF


def mix_by_hand(word: int) -> int:
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & MASK
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & MASK
    return word ^ (word >> 16)


def checksum_by_hand(words: list[int]) -> list[int]:
    """The definition with Python's integers, one word at a time."""
    return [
        sum(mix_by_hand(w ^ mix_by_hand((i + seed) & MASK)) for i, w in enumerate(words)) & MASK
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]


def words_of(array: np.ndarray) -> list[int]:
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    return [int(word) for word in np.ascontiguousarray(array).reshape(-1).view(kind)]


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8", "bool", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_equals_the_definition(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 5
    array = jnp.asarray(np.abs(values) if dtype == "uint8" else values).astype(dtype)
    assert array_checksum(array).tolist() == checksum_by_hand(words_of(np.asarray(array)))
    assert host_checksum(np.asarray(array)).tolist() == array_checksum(array).tolist()


def test_the_host_sums_part_by_part(monkeypatch):
    array = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    whole = host_checksum(array).tolist()
    monkeypatch.setattr(seal, "_PART", 4)
    assert host_checksum(array).tolist() == whole
    assert host_checksum(array.T).tolist() == array_checksum(jnp.asarray(array.T)).tolist()


def test_other_dtypes():
    key = jax.random.key(3)
    assert (array_checksum(key) == array_checksum(jax.random.key_data(key))).all()
    numbers = jnp.array([1 + 2j, 3 - 4j], jnp.complex64)
    assert array_checksum(numbers).tolist() == checksum_by_hand(
        words_of(np.array([1, 2, 3, -4], np.float32))
    )
    nibbles = jnp.array([-1, 7], jnp.int4)
    assert array_checksum(nibbles).tolist() == checksum_by_hand([MASK, 7])
    for array in (numbers, nibbles):
        assert host_checksum(np.asarray(array)).tolist() == array_checksum(array).tolist()


def test_is_the_same_on_any_mesh():
    array = jax.random.normal(jax.random.key(0), (8, 16, 3))
    expected = array_checksum(array).tolist()
    devices = jax.device_count()
    for spec in (PartitionSpec("a"), PartitionSpec(None, "a"), PartitionSpec()):
        mesh = jax.make_mesh((devices,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert array_checksum(placed).tolist() == expected


def test_every_single_bit_counts():
    array = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    whole = array_checksum(jnp.asarray(array))
    for element in range(array.size):
        for bit in range(32):
            damaged = array.copy()
            damaged.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
            found = array_checksum(jnp.asarray(damaged))
            assert (found != whole).all(), (element, bit)  # a bijection: both sums must change


def test_negative_zero_and_nan_payloads_count():
    def checksum(bits):
        return array_checksum(jnp.asarray(np.array([bits], np.uint32).view(np.float32))).tolist()

    zero, negative_zero, nan, other_nan = map(checksum, (0, 1 << 31, 0x7FC00000, 0x7FC00001))
    assert zero != negative_zero and nan != other_nan


@settings(deadline=None, max_examples=50)
@given(
    words=st.lists(st.integers(0, MASK), min_size=6, max_size=6),
    order=st.permutations(range(6)),
)
def test_every_rearrangement_counts(words, order):
    array = np.array(words, np.uint32).reshape(2, 3)
    moved = np.array([words[i] for i in order], np.uint32).reshape(2, 3)
    equal = (
        array_checksum(jnp.asarray(array)).tolist() == array_checksum(jnp.asarray(moved)).tolist()
    )
    assert equal == (array == moved).all()


def test_equal_values_at_other_places_of_another_layout_count():
    array = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    assert (array_checksum(array) != array_checksum(array.T)).all()
    assert (array_checksum(array) == array_checksum(array.T.T)).all()


def test_tree_keeps_its_structure():
    tree = {"a": jnp.ones(3), "b": (jnp.zeros((), jnp.int32), None), "key": jax.random.key(3)}
    sums = tree_checksums(tree)
    assert jax.tree.structure(sums) == jax.tree.structure(tree)
    compiled = jax.tree.map(array_checksum, tree)
    assert jax.tree.map(list, sums) == jax.tree.map(lambda x: x.tolist(), compiled)
    assert all(s.shape == (2,) and s.dtype == jnp.uint32 for s in jax.tree.leaves(sums))
