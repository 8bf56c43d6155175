"""Attributes of the world's scenes as labels."""

import json

import numpy as np
import pytest

from unified_mm.analysis.scenes import read_scenes, scene_targets
from unified_mm.world.build import scene_graph
from unified_mm.world.scenes import ATTRIBUTES, WorldSpec, sample_scene


def test_labels_are_what_the_scenes_hold(tmp_path):
    scenes = [sample_scene(WorldSpec(), "val", number) for number in range(30)]
    (tmp_path / "annotations").mkdir()
    content = {"scenes": [scene_graph(scene) for scene in scenes]}
    (tmp_path / "annotations" / "scenes_val.json").write_text(json.dumps(content))
    read = read_scenes(tmp_path, "val")
    assert list(read) == [scene.id for scene in scenes]
    targets = {target.name: target for target in scene_targets(list(read.values()))}
    assert len(targets) == 1 + sum(map(len, ATTRIBUTES.values()))
    for i, scene in enumerate(scenes):
        count = targets["objects/count"]
        assert count.classes[count.labels[i]] == str(len(scene.objects))
        for attribute, values in ATTRIBUTES.items():
            for value in values:
                holds = any(getattr(thing, attribute) == value for thing in scene.objects)
                assert targets[f"{attribute}/{value}"].labels[i] == holds
    assert 0 < np.mean(targets["colour/red"].labels) < 1


def test_what_is_no_world_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="scenes_val.json.*give --images=DIR"):
        read_scenes(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "scenes_val.json").write_text('{"scenes": [1]}')
    with pytest.raises(ValueError, match="holds no list of scenes"):
        read_scenes(tmp_path, "val")
