"""A stem from a file as torch wrote it of old, read by what knows tensors alone."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from old_torch import old_file, weights, written

from unified_mm.config import Config
from unified_mm.import_weights import import_directory, write_run
from unified_mm.inference import imported
from unified_mm.inference.imported import run_of
from unified_mm.pretrained import hub
from unified_mm.pretrained.torch_file import TorchFile
from unified_mm.task import build_task
from unified_mm.training.start_from import config_from_run, load_params, weights_to_start_from


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """A folder with one file of weights, and the tensors in it."""
    folder, tensors = tmp_path_factory.mktemp("eyes"), weights()
    written(folder, old_file(tensors))
    return folder, tensors


@pytest.fixture(scope="module")
def run(eyes, tmp_path_factory):
    return write_run(import_directory(eyes[0]), tmp_path_factory.mktemp("runs") / "eyes").path


def test_batch_norms_are_folded_into_the_convolutions_before_them(eyes, tmp_path):
    folder, theirs = eyes
    imported = import_directory(folder)
    assert (imported.part, imported.tokenizer) == ("stem", None)
    ours = imported.params["embedders_image"]["stem"]
    assert sum("block" in name for name in ours) == 16
    scale = theirs["_bn0.weight"] / np.sqrt(theirs["_bn0.running_var"] + 1e-3)
    x = np.random.default_rng(1).normal(size=27)
    convolved = theirs["_conv_stem.weight"].transpose(0, 2, 3, 1).reshape(32, 27) @ x
    expected = (convolved - theirs["_bn0.running_mean"]) * scale + theirs["_bn0.bias"]
    found = x @ ours["first"]["kernel"].reshape(27, 32) + ours["first"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    scale = theirs["_blocks.3._bn1.weight"] / np.sqrt(theirs["_blocks.3._bn1.running_var"] + 1e-3)
    kernel = theirs["_blocks.3._depthwise_conv.weight"][:, 0] * scale[:, None, None]
    np.testing.assert_allclose(
        ours["block_3"]["depthwise"]["kernel"], kernel.transpose(1, 2, 0), rtol=1e-5
    )
    assert any("classifier" in reason for reason in imported.ignored)


class Sly:
    def __reduce__(self):
        return print, ("this must never run",)


def test_what_is_no_tensor_is_refused_and_never_run(tmp_path, capsys):
    path = written(tmp_path, old_file({"x": np.ones(3)}, {"more": Sly()}))
    with pytest.raises(ValueError, match="no tensors that can be read safely: it asks for .*print"):
        import_directory(tmp_path)
    assert "never run" not in capsys.readouterr().out
    path.write_bytes(old_file({"x": np.ones(3)}, {"more": 3}))
    with pytest.raises(ValueError, match="other things than tensors"):
        TorchFile(path)


@pytest.mark.parametrize("kept", (0, 9, 40, 300, -1))
def test_a_file_that_is_cut_is_refused(kept, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(old_file({"x": np.arange(64)})[:kept])
    with pytest.raises(ValueError, match="weights.pth holds no tensors that can be read safely"):
        TorchFile(path)


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    path = written(tmp_path, old_file({"x": np.ones(3)}))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="its SHA-256 does not begin with .* it is damaged"):
        import_directory(tmp_path)


def test_old_files_hold_what_was_put_into_them(tmp_path):
    values = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(())}
    path = tmp_path / "weights.pth"
    path.write_bytes(old_file(values))
    with TorchFile(path) as file:
        assert sorted(file.keys()) == ["a", "b"] and file.get_slice("a").get_dtype() == "F32"
        for name, expected in values.items():
            np.testing.assert_array_equal(file.get_tensor(name), expected)


def test_early_fusion_begins_with_the_stem(run):
    changes = {
        "model__fusion": "early",
        "objectives__matching__weight": 0.0,
        "objectives__captioning__weight": 0.0,
    }
    start = tiny.config_dict(model__start_from__stem=str(run), **changes)
    chosen = config_from_run(start, ())
    assert config_from_run(chosen, ()).to_dict() == chosen.to_dict()
    config = Config(chosen.to_dict())
    params = tiny.params(build_task(config, tiny.tokenizer()))
    begun = load_params(params, config, weights_to_start_from(config))
    same = jax.tree.map(np.array_equal, jax.device_get(params), jax.device_get(begun))
    stem = same["embedders_image"].pop("stem")
    assert not any(jax.tree.leaves(stem)) and all(jax.tree.leaves(same))


def test_a_stem_is_asked_for_as_one(run):
    config = tiny.config_dict(model__fusion="late", objectives__matching__weight=0.0)
    config.model.start_from.image = str(run)
    with pytest.raises(ValueError, match="holds weights of stem alone: give it as .*from.stem"):
        config_from_run(config, ())
    config.model.start_from.stem = str(run)
    with pytest.raises(ValueError, match="give one of them|give it as"):
        config_from_run(config, ())


def test_weights_in_an_installed_package_are_imported_once(eyes, tmp_path, monkeypatch):
    package = tmp_path / "some_eyes"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('it is never imported')")
    (package / "models").symlink_to(eyes[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    first = run_of("package:some_eyes/models", tmp_path / "cache")
    made = Path(first, "config.json").stat().st_mtime_ns
    assert run_of("package:some_eyes/models", tmp_path / "cache") == first
    assert Path(first, "config.json").stat().st_mtime_ns == made
    # Another command begins at the same time, and is faster.
    write = imported.write_run
    monkeypatch.setattr(imported, "write_run", lambda *given: (write(*given), write(*given)))
    assert Path(run_of("package:some_eyes/models", tmp_path / "other"), "config.json").is_file()
    monkeypatch.setitem(hub.BROUGHT_BY, "no_eyes", ("no-eyes", "eyes"))
    with pytest.raises(FileNotFoundError, match=r"no_eyes is not installed: .*unified_mm\[eyes\]"):
        run_of("package:no_eyes/models", tmp_path / "cache")
