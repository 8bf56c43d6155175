"""The clips that are drawn: the same each time, their own mirror in time, read as COCO captions."""

import numpy as np

from unified_mm.data.sources import find_clips, foils_of
from unified_mm.default_config import default_config
from unified_mm.world import drawn


def test_a_clip_is_a_function_of_its_number():
    for number in range(4):
        scene = drawn.scene_of("val", number)
        assert scene == drawn.scene_of("val", number) != drawn.scene_of("train", number)
        np.testing.assert_array_equal(drawn.draw(scene), drawn.draw(scene))
        assert drawn.draw(scene).shape == (16, 48, 48, 3)
        assert scene.direction in scene.caption() and scene.event in scene.caption()
        foil = scene.caption(direction=drawn.OPPOSITE[scene.direction])
        words = zip(scene.caption().split(), foil.split(), strict=True)
        assert sum(one.strip(",") != other.strip(",") for one, other in words) == 1


def test_solids_stay_within_and_move_as_they_say():
    times = np.linspace(0, drawn.SECONDS, 17)
    for number in range(200):
        scene = drawn.scene_of("train", number)
        path = np.stack([drawn.places(scene, time) for time in times])
        assert path.min() >= drawn.RADIUS - 1e-9 and path.max() <= 1 - drawn.RADIUS + 1e-9
        steps = np.diff(path, axis=0) @ np.array(drawn.DIRECTIONS[scene.direction])
        assert (steps > 0).all()
        apart = np.linalg.norm(path[:, 0] - path[:, 1], axis=1).min()
        assert apart >= (2.0 if scene.event == "hit" else 2.2) * drawn.RADIUS - 1e-9


def test_a_clip_played_backwards_is_one_of_the_other_direction():
    """So no picture alone tells the direction."""
    for number in range(50):
        scene = drawn.scene_of("train", number)
        end = drawn.SECONDS
        swapped = scene.event == "hit"
        solids = scene.solids[::-1] if swapped else scene.solids
        lanes = scene.lanes[::-1] if swapped else scene.lanes
        back = drawn.Scene(
            solids, drawn.OPPOSITE[scene.direction], scene.event, end - scene.when,
            1 - scene.where, lanes, scene.grey, scene.sentence, scene.swapped,
        )  # fmt: skip
        for time in (0.0, 0.7, 1.3, 2.0):
            found = drawn.places(back, end - time)
            found = found[::-1] if swapped else found
            np.testing.assert_allclose(found, drawn.places(scene, time), atol=1e-9)


def test_they_are_what_is_read_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "CLIPS", {"train": 4, "val": 3})
    data = default_config().data
    data.update({"source": "clips", "cache_dir": str(tmp_path)})
    source = find_clips(data)
    assert "CLIPS THAT ARE DRAWN" in source.banner.upper() and source.name == "clips"
    found = {name: source.manifest(name) for name in source.splits()}
    assert {name: len(each.records) for name, each in found.items()} == {"train": 4, "val": 3}
    record = found["val"].records[0]
    assert list(record.parts) == ["video"] and not record.mirrorable
    for split, count in drawn.CLIPS.items():
        foils = foils_of(source, split)
        kinds = sorted({foil.kind for foil in foils})
        assert kinds == ["direction", "event"] and len(foils) == 2 * count
        assert all(foil.caption == drawn.scene_of(split, foil.image_id).caption() for foil in foils)
    assert find_clips(data).manifest("val").fingerprint == found["val"].fingerprint
