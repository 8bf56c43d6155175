"""Checkpoints: bit-exact on any mesh, and never one that is not whole."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unified_mm.runs import checkpoints as module
from unified_mm.runs.checkpoints import CheckpointError, Checkpoints, DamagedCheckpointWarning
from unified_mm.runs.seal import SEAL, broken_files, write_seal


def make_state(seed: int):
    return {
        "params": {"kernel": jax.random.normal(jax.random.key(seed), (8, 4)), "bias": jnp.ones(3)},
        "half": jnp.full((5,), seed, jnp.bfloat16),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
        "optimizer": (jnp.zeros(()), None),
    }


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def bits(state):
    def data(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return jax.tree.map(data, state)


def save_steps(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})


def restore(folder, **options):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), **options)


def files_of(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2, both whole. Tests that damage work on a copy."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
    save_steps(tmp_path, 1, 2, 3, asynchronous=asynchronous)
    restored = restore(tmp_path)
    assert (restored.step, restored.metadata) == (3, {"position": 3})
    assert bits(restored.state) == bits(make_state(3))
    assert restored.state["half"].dtype == jnp.bfloat16
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == (2, 3)  # keep=2
        assert checkpoints.restore(abstract(make_state(0)), step=2).metadata == {"position": 2}
    assert not broken_files(tmp_path / "3")


def test_metadata_comes_back_as_json_has_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {"shape": (1, 2), "counts": {10: "a", 9: "b"}, "x": 0.1})
        restored = checkpoints.restore(abstract(make_state(0)))
    assert restored.metadata == {"shape": [1, 2], "counts": {"10": "a", "9": "b"}, "x": 0.1}


def test_restores_onto_another_mesh(saved):
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = abstract(make_state(0), NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("a"))
    asked["params"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)
    with Checkpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(asked)
    kernel = restored.state["params"]["kernel"]
    assert kernel.sharding == split and kernel.addressable_shards[0].data.shape == (8 // devices, 4)
    assert bits(restored.state) == bits(make_state(2))


def test_state_may_be_donated_once_save_returns(tmp_path):
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0
    )
    state = {"w": jnp.arange(200_000.0)}
    expected = bits(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        assert (
            bits(checkpoints.restore({"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}).state)
            == expected
        )


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_each_file_is_found_and_stepped_over(copy, damage):
    files = files_of(copy / "2")
    assert {"_METADATA", "_sharding", "manifest.ocdbt", SEAL} <= {path.name for path in files}
    for path in files:
        if (damage, path.name) == (Path.unlink, SEAL):
            continue  # then the checksums alone decide: see the next test
        whole = path.read_bytes()
        damage(path)
        with pytest.warns(DamagedCheckpointWarning, match=r"step 2 in .*: files differ"):
            restored = restore(copy)
        path.write_bytes(whole)
        assert restored.step == 1 and bits(restored.state) == bits(make_state(1)), path
    assert restore(copy).step == 2


# Orbax leaves coroutines behind when a read fails; their end is reported, and means nothing.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_without_a_seal_the_checksums_decide(copy):
    """A process killed between commit and seal: damage may pass only where nothing came of it."""
    (copy / "2" / SEAL).unlink()
    assert restore(copy).step == 2
    found = set()
    for path in files_of(copy / "2"):
        whole = path.read_bytes()
        flip(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = restore(copy)
        path.write_bytes(whole)
        assert bits(restored.state) == bits(make_state(restored.step)), path
        assert restored.metadata == {"position": restored.step}, path
        named = [w for w in caught if w.category is DamagedCheckpointWarning]
        assert len(named) == (restored.step == 1), path
        if named:
            found.add(path.relative_to(copy / "2").parts[0])
    assert found >= {"state", "metadata", "checksums"}


def test_a_wrong_value_in_files_that_are_whole_is_named_by_leaf(copy):
    """Damage before the seal was made: only the checksum from the device can tell."""
    shutil.rmtree(copy / "2")
    says = r"checkpoints/2 is damaged: leaves differ from what was saved: params/kernel\."
    with pytest.raises(CheckpointError, match=says), Checkpoints(copy) as checkpoints:
        true_checksums = module._describe_arrays(make_state(2))
        true_checksums["params/kernel"]["checksum"] = "0" * 16
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_describe_arrays", lambda state: true_checksums)
            checkpoints.save(2, make_state(2), {})
    with pytest.warns(DamagedCheckpointWarning, match="from their checksums: params/kernel$"):
        assert restore(copy).step == 1


def test_training_goes_on_over_a_damaged_step_and_keeps_it_aside(copy):
    for _ in range(2):  # twice: a name that is taken is not overwritten
        flip(copy / "2" / "metadata" / "metadata")
        damaged = (copy / "2" / "metadata" / "metadata").read_bytes()
        with Checkpoints(copy) as checkpoints:
            with pytest.warns(DamagedCheckpointWarning):
                assert checkpoints.restore(abstract(make_state(0))).step == 1
            checkpoints.save(2, make_state(2), {"position": 2})
            assert checkpoints.steps() == (1, 2)
        assert restore(copy).step == 2
    assert sorted(os.listdir(copy)) == ["1", "2", "2.damaged", "2.damaged.1"]
    assert (copy / "2.damaged.1" / "metadata" / "metadata").read_bytes() == damaged


def test_damaged_steps_do_not_push_out_good_ones(copy):
    flip(copy / "2" / "state" / "_METADATA")
    with Checkpoints(copy, keep=2) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning):
            checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(3, make_state(3), {})
        checkpoints.wait()
        assert checkpoints.steps() == (1, 3)


def test_none_whole_lists_each_and_why(copy):
    flip(copy / "1" / "state" / "_sharding")
    shutil.rmtree(copy / "2" / "state")
    with pytest.raises(CheckpointError) as error:
        restore(copy)
    assert "step 2 in " in str(error.value) and "state/_METADATA" in str(error.value)
    assert "step 1 in " in str(error.value) and "state/_sharding" in str(error.value)


def test_one_step_asked_for_is_never_replaced_by_another(copy):
    flip(copy / "2" / "state" / "_METADATA")
    with pytest.raises(CheckpointError, match="step 2 in"):
        restore(copy, step=2)
    with pytest.raises(CheckpointError, match="step 7 in .*no such folder"):
        restore(copy, step=7)


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="the folder holds none"):
        restore(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert os.listdir(tmp_path) == []


def test_nothing_is_cast_or_reshaped(saved):
    asked = abstract(make_state(0))
    asked["params"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    asked["step"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    asked["more"] = jax.ShapeDtypeStruct((), jnp.int32)
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(asked)
    assert "params/bias: saved float32[3], asked bfloat16[3]" in str(error.value)
    assert "step: saved int32[], asked int32[1]" in str(error.value)
    assert "more: saved nothing, asked int32[]" in str(error.value)


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="leaf a/b is a ndarray"):
            checkpoints.save(1, {"a": {"b": np.zeros(3)}}, {})
        with pytest.raises(ValueError, match="leaf a has shape"):
            checkpoints.save(1, {"a": jnp.zeros((0, 3))}, {})
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(1, make_state(1), {"loss": float("nan")})
        checkpoints.save(3, make_state(3), {})
        with pytest.raises(ValueError, match="cannot save step 3, step 3 is there"):
            checkpoints.save(3, make_state(3), {})


def test_read_only_changes_nothing(copy):
    flip(copy / "2" / "state" / "_METADATA")
    before = [(path, path.read_bytes()) for path in files_of(copy)]
    with Checkpoints(copy, read_only=True) as checkpoints:
        with pytest.warns(DamagedCheckpointWarning):
            checkpoints.restore(abstract(make_state(0)))
        with pytest.raises(ValueError, match="read-only"):
            checkpoints.save(3, make_state(3), {})
    assert [(path, path.read_bytes()) for path in files_of(copy)] == before


def test_a_leftover_of_a_killed_save_is_no_obstacle(copy):
    for step in (3, 7):
        leftover = copy / f"{step}.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
        shutil.copytree(copy / "2" / "state", leftover)
    assert restore(copy).step == 2
    save_steps(copy, 3)
    assert sorted(os.listdir(copy)) == ["2", "3"]
    restored = restore(copy)
    assert restored.step == 3 and bits(restored.state) == bits(make_state(3))


def test_a_step_is_sealed_while_training_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    deadline = time.monotonic() + 10
    while not (tmp_path / "1" / SEAL).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "1" / SEAL).exists()
    checkpoints.close()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_the_first_step_is_read_back(tmp_path, monkeypatch, damage, asynchronous):
    """A disk that loses what it was given, before anything was read again."""
    read = []

    def losing(folder, leaves):
        read.append(folder.parent.name)
        damage(max(folder.rglob("d/*"), key=lambda path: path.stat().st_size))
        return real(folder, leaves)

    real = module._read_back
    monkeypatch.setattr(module, "_read_back", losing)
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match=r"written to .*1 is damaged: .*see that it has room"):
        checkpoints.save(2, make_state(2), {})
    assert not (tmp_path / "1" / SEAL).exists()
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert read == ["1"] and restore(tmp_path).step == 2


def test_what_was_read_back_is_known_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_read_back", lambda folder, leaves: iter(()))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    checkpoints.save(1, make_state(1), {})
    deadline = time.monotonic() + 10
    with pytest.raises(CheckpointError, match="is damaged"):
        while time.monotonic() < deadline:
            checkpoints.check()
            time.sleep(0.01)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.close()


# Each lost all weights in silence, took those of another run, or ended in TensorStore's error.
@pytest.mark.parametrize("name", ["[ab]", "a*", "what?", "a**b", "a\\b", "gs:"])
def test_names_that_lose_weights_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"cannot be written in .*Rename that folder"):
        Checkpoints(tmp_path / name / "checkpoints")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["{a,b}", "a]", "%2F", "s3:", "a b", "a\nb", "é", "~"])
def test_other_names_keep_their_weights(tmp_path, name):
    save_steps(tmp_path / name, 1)
    assert bits(restore(tmp_path / name).state) == bits(make_state(1))


def test_what_was_moved_under_such_a_name_is_read(saved, tmp_path):
    for name in ("[ab]", "what?"):
        moved = shutil.copytree(saved, tmp_path / name)
        with Checkpoints(moved, read_only=True) as checkpoints:
            params = {"params": abstract(make_state(0))["params"]}
            assert checkpoints.restore(params, partial=True).step == 2
    with pytest.raises(ValueError, match=r"cannot be read in .*a\\b: its path has '\\\\'"):
        Checkpoints(shutil.copytree(saved, tmp_path / "a\\b"), read_only=True)


def test_the_seal_is_what_sha256sum_reads(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    (tmp_path / "b").write_bytes(b"\0\1")
    write_seal(tmp_path)
    check = subprocess.run(["sha256sum", "--check", SEAL], cwd=tmp_path, capture_output=True)
    assert check.returncode == 0 and check.stdout == b"b: OK\nfolder/a: OK\n"
    (tmp_path / "c").write_text("added")
    assert broken_files(tmp_path) == ("c",)


SAVER = """
import sys
import jax.numpy as jnp
from unified_mm.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
first = max(checkpoints.steps(), default=0) + 1
for step in range(first, 1000):
    checkpoints.save(step, {"w": jnp.full((500_000,), step, jnp.float32)}, {"position": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_from_a_whole_step(tmp_path):
    asked = {"w": jax.ShapeDtypeStruct((500_000,), jnp.float32)}
    reached = 0
    for delay in (0.0, 0.013, 0.05, 0.11, 0.3):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with saver:
            announced = [int(saver.stdout.readline()) for _ in range(3)]
            time.sleep(delay)
            saver.send_signal(signal.SIGKILL)
        assert saver.returncode == -signal.SIGKILL
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(asked)
        # A save waits for the one before it: what was announced two saves ago is there.
        assert restored.step >= announced[1] > reached
        assert restored.metadata == {"position": restored.step}
        assert (np.asarray(restored.state["w"]) == restored.step).all()
        reached = restored.step
