"""The benchmark says which recipe it measured: its file, and what that sets other than defaults."""

import json

import pytest

from unified_mm import bench


def test_the_recipe_is_named_with_what_it_sets(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "prepare", lambda config, *_: config)
    monkeypatch.setattr(bench, "measure", lambda *_: {"mfu": 0.5})
    output = tmp_path / "bench.json"
    recipe = "--config=configs/coco.py:tiny"
    fields = "--config.train.b1=0.5", f"--config.data.cache_dir={tmp_path}", "--config.mesh.fsdp=2"
    with pytest.raises(SystemExit, match="^0$"):
        bench.main([recipe, *fields, f"--output={output}"])
    said = json.loads(output.read_text())
    assert (said["mfu"], said["recipe"]) == (0.5, "configs/coco.py:tiny")
    assert said["sets"]["train.b1"] == "0.5" and said["sets"]["mesh.fsdp"] == "2"
    assert said["sets"]["size"] == '"tiny"' and "train.b2" not in said["sets"]
    assert str(tmp_path) not in output.read_text()
