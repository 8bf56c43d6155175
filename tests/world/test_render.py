"""The renderer against slow, plain ways to know the same: marching, angles, the light formula."""

import math
from dataclasses import replace

import numpy as np
import pytest

from unified_mm.world import render as renderer
from unified_mm.world.render import interval, render, render_ids
from unified_mm.world.scenes import (
    COLOURS,
    MATERIALS,
    SHAPES,
    Camera,
    Object,
    Scene,
    WorldSpec,
    sample_scene,
)

SPEC = WorldSpec()
CAMERA = Camera(azimuth=0.1, elevation=0.6, distance=2.9, focal=2.9, height=0.3)
LIGHT = (0.36, -0.48, 0.8)


def one(shape, colour="red", material="matte", **places):
    place = {"x": 0.0, "y": 0.0, "rotation": 0.6, "radius": 0.45} | places
    return Scene(0, (Object(shape, colour, "large", material, **place),), CAMERA, LIGHT)


def inside(thing, points):
    """Whether points `[..., 3]` are in a body, by its definition."""
    x, y, z = np.moveaxis(points - np.array(thing.centre), -1, 0)
    c, s = math.cos(thing.rotation), math.sin(thing.rotation)
    width, height = thing.half_width, thing.half_height
    if thing.shape == "sphere":
        return x**2 + y**2 + z**2 < thing.radius**2
    if thing.shape == "cylinder":
        return (x**2 + y**2 < width**2) & (abs(z) < height)
    return (abs(c * x + s * y) < width) & (abs(c * y - s * x) < width) & (abs(z) < height)


def ray_directions(scene, size):
    """Unit rays `[size, size, 3]` through pixels' centres, from the definition of the picture."""
    right, up, forward = scene.camera.axes()
    steps = (2 * np.arange(size) + 1) / size - 1
    rays = forward + (steps[None, :, None] * right - steps[:, None, None] * up) / scene.camera.focal
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_agree_with_marching_along_the_ray(shape):
    rng = np.random.default_rng(0)
    thing = one(shape, x=0.3, y=-0.2).objects[0]
    origins = rng.normal(size=(300, 3))
    origins *= 2 / np.linalg.norm(origins, axis=1, keepdims=True)
    aims = np.array(thing.centre) + rng.uniform(-0.5, 0.5, (300, 3))
    rays = (aims - origins) / np.linalg.norm(aims - origins, axis=1, keepdims=True)
    step = 0.004
    march = np.arange(0, 4, step)
    within = inside(thing, origins[:, None] + march[:, None] * rays[:, None])
    near, far = interval(thing, origins.T.astype(np.float32), rays.T.astype(np.float32))

    met = within.any(axis=1)
    assert 50 < met.sum() < 290  # both cases are tried
    assert (near < far)[met].all()
    assert (far - near)[~met & (near < far)].max(initial=0) < 2 * step  # a graze between two steps
    first, last = within.argmax(axis=1) * step, march[-1] - within[:, ::-1].argmax(axis=1) * step
    assert abs(near - first)[met].max() < 1.5 * step
    assert abs(far - last)[met].max() < 1.5 * step


def test_a_ray_that_runs_along_an_axis_is_no_division_by_zero():
    thing = one("cube", rotation=0.0, radius=0.5).objects[0]
    origin = np.array([[-2.0, -2.0], [0.0, 0.9], [0.4, 0.4]], np.float32)
    direction = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    near, far = interval(thing, origin, direction)
    np.testing.assert_allclose([near[0], far[0]], [1.6, 2.4], atol=1e-5)
    assert near[1] > far[1]


def test_a_sphere_fills_the_cone_of_rays_that_touch_it():
    scene = one("sphere", x=-0.2, y=0.3)
    thing = scene.objects[0]
    towards = np.array(thing.centre) - scene.camera.position()
    distance = np.linalg.norm(towards)
    angle = np.arccos(ray_directions(scene, 64) @ towards / distance)
    expected = angle < math.asin(thing.radius / distance)
    assert ((render_ids(scene, 64) == 0) == expected).all()


def test_first_hits_agree_with_marching_through_whole_scenes():
    """Which object every pixel shows: nearest first, none cut off by the boxes that save work."""
    size, march = 32, np.arange(1.2, 5, 0.006)
    for index in (1, 4, 9):
        scene = sample_scene(SPEC, "train", index)
        along = march[:, None] * ray_directions(scene, size)[:, :, None]
        points = scene.camera.position() + along
        within = np.stack([inside(thing, points) for thing in scene.objects])
        first = np.where(within.any(axis=-1), within.argmax(axis=-1), len(march))
        expected = np.where(first.min(axis=0) < len(march), first.argmin(axis=0), -1)
        assert (render_ids(scene, size) != expected).mean() < 0.004  # grazed edges


def test_ground_is_bright_or_in_the_shadow_that_marching_to_the_light_finds():
    size, march = 48, np.arange(0.01, 3, 0.01)
    checked = 0
    for index in (1, 4, 9):
        scene = sample_scene(SPEC, "train", index)
        light, eye, rays = (
            np.array(scene.light),
            scene.camera.position(),
            ray_directions(scene, size),
        )
        ground = eye - rays * (eye[2] / rays[..., 2:])
        towards_light = ground[:, :, None] + march[:, None] * light
        dark = np.any([inside(o, towards_light).any(axis=-1) for o in scene.objects], axis=0)
        shade = renderer.GROUND * (renderer.AMBIENT + renderer.DIFFUSE * light[2] * ~dark)
        expected = 255 * shade ** (1 / 2.2)
        bare = render_ids(scene, size) == -1
        wrong = (abs(render(scene, size, 1)[..., 0] - expected) > 1.0) & bare
        assert wrong.sum() < 0.01 * bare.sum()  # the edge of a shadow
        checked += (dark & bare).sum()
    assert checked > 100


def test_matte_faces_follow_lamberts_law():
    """The top of a cylinder looks up: one flat colour, known from albedo and light."""
    picture = render(one("cylinder", "yellow"), 64, 1)
    albedo = np.array(renderer.ALBEDO["yellow"])
    linear = albedo * (renderer.AMBIENT + renderer.DIFFUSE * LIGHT[2])
    expected = np.rint(255 * np.clip(linear, 0, 1) ** (1 / 2.2))
    same = (abs(picture.astype(int) - expected) <= 1).all(axis=-1)
    assert same.sum() > 100  # the whole of the top


def test_a_picture_is_the_mean_of_its_rays_in_linear_light():
    scene = sample_scene(SPEC, "val", 0)
    fine = (render(scene, 64, 1) / 255) ** 2.2
    mean = fine.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) ** (1 / 2.2)
    assert abs(render(scene, 32, 2) / 255 - mean).max() < 0.01


def test_colours_stay_apart_whatever_the_shape():
    def mean(colour, shape, material):
        scene = one(shape, colour, material)
        return render(scene, 64, 2)[render_ids(scene, 64) == 0].mean(axis=0)

    known = {
        material: np.array([mean(colour, "sphere", material) for colour in COLOURS])
        for material in MATERIALS
    }
    for material, means in known.items():
        gaps = np.linalg.norm(means[:, None] - means[None], axis=-1) + 1e9 * np.eye(len(COLOURS))
        assert gaps.min() > 35, (material, gaps.min())  # of 255
        for shape in ("cube", "cylinder"):
            for i, colour in enumerate(COLOURS):
                distance = np.linalg.norm(means - mean(colour, shape, material), axis=1)
                assert distance.argmin() == i, (colour, shape, material)


@pytest.mark.parametrize("shape", SHAPES)
def test_shiny_things_are_brighter_and_uneven(shape):
    matte, shiny = (one(shape, "blue", material) for material in ("matte", "shiny"))
    seen = render_ids(matte, 64) == 0
    plain, polished = (render(scene, 64, 1)[seen].astype(float) for scene in (matte, shiny))
    assert polished.max(axis=0)[0] > plain.max(axis=0)[0] + 60
    assert polished.std(axis=0)[0] > 2 * plain.std(axis=0)[0]


def test_same_scene_same_bytes():
    scene = sample_scene(SPEC, "train", 5)
    first = render(scene, 48, 2)
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    assert (render(scene, 48, 2) == first).all()
    assert (render(replace(scene, light=LIGHT), 48, 2) != first).any()
