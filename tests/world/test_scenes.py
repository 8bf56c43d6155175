"""Scenes of the embedded world: drawn again alike, held-out pairs, every object plainly in view."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_mm.world import scenes
from unified_mm.world.render import render_ids
from unified_mm.world.scenes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    Camera,
    Object,
    Scene,
    WorldSpec,
    outline,
    sample_scene,
)

SPEC = WorldSpec()


@pytest.fixture(scope="module")
def drawn():
    return {split: [sample_scene(SPEC, split, i) for i in range(80)] for split in scenes.SPLITS}


@pytest.fixture(scope="module")
def crowded():
    spec = replace(SPEC, object_weights=(0.0, 0.0, 0.0, 1.0))
    return [sample_scene(spec, "train", i) for i in range(60)]


def pairs(scene):
    return {(thing.colour, thing.shape) for thing in scene.objects}


def test_a_scene_depends_on_seed_split_and_index_alone(drawn):
    again = [sample_scene(SPEC, "train", i) for i in (7, 3)]
    assert again == [drawn["train"][7], drawn["train"][3]]
    assert sample_scene(replace(SPEC, train=9), "train", 3) == again[1]  # a longer split: the same
    assert sample_scene(replace(SPEC, seed=1), "train", 3) != again[1]
    assert len({repr(scene.objects) for split in drawn.values() for scene in split}) == 240
    assert len({scene.id for split in drawn.values() for scene in split}) == 240


def test_each_colour_has_one_held_out_shape_and_shapes_share_them():
    assert sorted(colour for colour, _ in HELD_OUT) == sorted(COLOURS)
    counts = [sum(shape == held for _, held in HELD_OUT) for shape in SHAPES]
    assert max(counts) - min(counts) <= 1


def test_held_out_pairs_are_shown_in_every_composition_scene_and_nowhere_else(drawn):
    for scene in drawn["train"] + drawn["val"]:
        assert not pairs(scene) & set(HELD_OUT)
    for scene in drawn["test_composition"]:
        assert pairs(scene) & set(HELD_OUT)
    shown = set().union(*map(pairs, drawn["test_composition"])) & set(HELD_OUT)
    assert shown == set(HELD_OUT)
    assert len(set().union(*map(pairs, drawn["train"]))) == len(COLOURS) * 2


def test_no_two_objects_of_a_scene_have_the_same_four_words(drawn):
    for scene in drawn["train"]:
        words = {(o.size, o.material, o.colour, o.shape) for o in scene.objects}
        assert len(words) == len(scene.objects)


def test_objects_are_wholly_in_the_picture_and_mostly_seen(drawn, crowded):
    size = 64
    for scene in drawn["train"][:20] + crowded:
        ids = render_ids(scene, size)
        for i, thing in enumerate(scene.objects):
            alone = render_ids(replace(scene, objects=(thing,)), size) == 0
            assert not (alone[0] | alone[-1] | alone[:, 0] | alone[:, -1]).any()
            assert (ids == i).sum() >= 0.75 * alone.sum()


def test_objects_come_from_left_to_right_with_clear_gaps(drawn):
    for scene in drawn["train"]:
        assert (np.diff(scene.places()[:, 0]) >= scenes.MIN_SIDE_GAP).all()


def test_objects_do_not_pass_through_each_other(crowded):
    """Points on the ground within one object's foot are in no other's, walked on a fine grid."""
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, 161)] * 2), axis=-1)
    for scene in crowded:
        feet = np.zeros(grid.shape[:2], int)
        for thing in scene.objects:
            x, y = np.moveaxis(grid - [thing.x, thing.y], -1, 0)
            c, s = math.cos(thing.rotation), math.sin(thing.rotation)
            if thing.shape == "cube":
                half = thing.half_width
                feet += (abs(c * x + s * y) < half) & (abs(c * y - s * x) < half)
            else:
                feet += x**2 + y**2 < thing.half_width**2
        assert feet.max() == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10**6), st.sampled_from(scenes.SPLITS))
def test_any_seed_finds_a_scene(seed, index, split):
    scene = sample_scene(replace(SPEC, seed=seed), split, index)
    assert 1 <= len(scene.objects) <= 4
    small = [o.radius for o in scene.objects if o.size == "small"]
    large = [o.radius for o in scene.objects if o.size == "large"]
    assert not (small and large) or max(small) < 0.75 * min(large)


def test_projection_is_a_pinhole_that_looks_at_its_target():
    camera = Camera(azimuth=0.3, elevation=0.6, distance=2.8, focal=2.9, height=0.3)
    # The same by the book: a look-at matrix in homogeneous coordinates.
    target = np.array([0, 0, 0.3])
    back = np.array([math.sin(0.3) * math.cos(0.6), -math.cos(0.3) * math.cos(0.6), math.sin(0.6)])
    eye = target + 2.8 * back
    right = np.cross(-back, [0, 0, 1])
    right /= np.linalg.norm(right)
    view = np.stack([right, np.cross(right, -back), -back])
    extrinsic = np.hstack([view, -(view @ eye)[:, None]])
    intrinsic = np.array([[2.9 / 2, 0, 0.5], [0, -2.9 / 2, 0.5], [0, 0, 1]])
    points = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    seen = (intrinsic @ extrinsic @ np.hstack([points, np.ones((50, 1))]).T).T
    expected = np.column_stack([seen[:, :2] / seen[:, 2:], seen[:, 2]])
    np.testing.assert_allclose(camera.project(points), expected, atol=1e-12)
    np.testing.assert_allclose(camera.project(target[None])[0], [0.5, 0.5, 2.8], atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_holds_the_body_and_is_no_wider(shape):
    thing = Object(shape, "red", "large", "matte", x=0.2, y=-0.3, rotation=0.7, radius=0.4)
    directions = np.random.default_rng(0).normal(size=(40, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    reach = ((outline(thing) - thing.centre) @ directions.T).max(axis=0)
    # How far the body itself reaches in each direction (its support function).
    width, height = thing.half_width, thing.half_height
    flat = np.hypot(directions[:, 0], directions[:, 1])
    if shape == "sphere":
        expected = np.full(40, 0.4)
    elif shape == "cylinder":
        expected = width * flat + height * abs(directions[:, 2])
    else:
        turn = np.arctan2(directions[:, 1], directions[:, 0]) - 0.7
        across = flat * (abs(np.cos(turn)) + abs(np.sin(turn)))
        expected = width * across + height * abs(directions[:, 2])
    assert (reach <= expected + 1e-9).all()
    assert (reach >= expected - 0.03 * thing.radius).all()
    assert outline(thing)[:, 2].min() == pytest.approx(0, abs=1e-9)  # it stands on the ground


def test_weights_decide_how_many_objects_there_are():
    spec = replace(SPEC, object_weights=(0.0, 0.0, 1.0, 0.0))
    assert {len(sample_scene(spec, "val", i).objects) for i in range(10)} == {3}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"object_weights": (1.0,)}, "object_weights has 1 entries and spans 4"),
        ({"object_weights": (1.0, -1.0, 1.0, 1.0)}, "are no weights"),
        ({"object_weights": (0.0,) * 4}, "are no weights"),
        ({"image_size": 0}, "image_size is 0"),
        ({"val": -1}, "val is -1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


def test_objects_too_large_for_a_picture_are_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(scenes, "MAX_DRAWS", 2 * scenes.DRAWS)
    spec = replace(SPEC, object_weights=(0.0, 0.0, 0.0, 1.0), spans=(0.9,) * 4)
    with pytest.raises(ValueError, match="4 objects of span 0.9 found no place.*spans smaller"):
        sample_scene(spec, "train", 0)


def test_an_unknown_split_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="no split 'test'; there are train, val, test_comp"):
        sample_scene(SPEC, "test", 0)


def test_places_of_a_scene_are_its_centres_projected():
    scene: Scene = sample_scene(SPEC, "val", 2)
    for thing, place in zip(scene.objects, scene.places(), strict=True):
        np.testing.assert_allclose(scene.camera.project(np.array(thing.centre)), place)
