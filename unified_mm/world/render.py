"""Images of scenes by analytic ray intersection, in float32, all rays of an object at once.

Vectors are component first, `[3, ...]`, so that each component is contiguous. Every object is
convex: a ray is inside it over one interval `(near, far)`, which serves first hits and shadows
alike (Kay and Kajiya 1986, "Ray tracing complex scenes", the slab method, for the interval of a
box).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int, UInt8

from unified_mm.world.scenes import Object, Scene, outline

# Linear albedo.
ALBEDO = {
    "red": (0.80, 0.03, 0.03),
    "green": (0.04, 0.42, 0.06),
    "blue": (0.03, 0.09, 0.75),
    "yellow": (0.90, 0.72, 0.02),
    "purple": (0.33, 0.03, 0.50),
    "orange": (0.95, 0.27, 0.01),
    "cyan": (0.04, 0.68, 0.75),
    "black": (0.018, 0.018, 0.018),
}
GROUND = 0.55
AMBIENT, DIFFUSE = 0.45, 0.75
SHARPNESS, HIGHLIGHT = 40, 1.6
NUDGE = 2e-3  # shadow rays start this far off the surface

Vectors = Float[np.ndarray, "3 ..."]
Scalars = Float[np.ndarray, "..."]
Box = tuple[slice, slice]


def render(scene: Scene, size: int, supersample: int = 2) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the scene as an sRGB image, with `supersample` x `supersample` rays a pixel."""
    wide = size * supersample
    eye, rays = _rays(scene, wide)
    distance, ids = _first_hits(scene, eye, rays)
    points = eye[:, None, None] + distance * rays
    normals = _normals(scene, points, ids)
    light = np.array(scene.light, np.float32)
    lit = _lit(scene, points + NUDGE * normals, light)
    colour = _shade(scene, rays, points, normals, ids, lit, light)
    pixels = colour.reshape(3, size, supersample, size, supersample).mean(axis=(2, 4))
    return np.rint(255 * np.clip(pixels, 0, 1) ** (1 / 2.2)).astype(np.uint8).transpose(1, 2, 0)


def render_ids(scene: Scene, size: int) -> Int[np.ndarray, "size size"]:
    """Returns the index in `scene.objects` that each pixel's centre shows, -1 for the ground."""
    return _first_hits(scene, *_rays(scene, size))[1]


def interval(thing: Object, origin: Vectors, direction: Vectors) -> tuple[Scalars, Scalars]:
    """Returns the near and far t between which rays `origin + t * direction` are inside an object.

    Rays with near > far miss it. `origin` broadcasts against `direction`.
    """
    cos, sin = np.float32(math.cos(thing.rotation)), np.float32(math.sin(thing.rotation))
    start = [origin[i] - np.float32(thing.centre[i]) for i in range(3)]
    start = [cos * start[0] + sin * start[1], cos * start[1] - sin * start[0], start[2]]
    step = [cos * direction[0] + sin * direction[1], cos * direction[1] - sin * direction[0]]
    step = [*step, direction[2]]
    if thing.shape == "sphere":
        return _inside_ball(start, step, thing.radius)
    if thing.shape == "cube":
        bounds = [_inside_slab(o, d, thing.half_width) for o, d in zip(start, step, strict=True)]
    else:
        bounds = [
            _inside_ball(start[:2], step[:2], thing.half_width),
            _inside_slab(start[2], step[2], thing.half_height),
        ]
    near, far = bounds[0]
    for low, high in bounds[1:]:
        near, far = np.maximum(near, low), np.minimum(far, high)
    return near, far


def _inside_ball(start: list, step: list, radius: float) -> tuple[Scalars, Scalars]:
    """Returns the interval in a sphere (three components) or an endless upright cylinder (two)."""
    a = np.maximum(sum(d * d for d in step), np.float32(1e-12))
    b = sum(o * d for o, d in zip(start, step, strict=True))
    c = sum(o * o for o in start) - np.float32(radius * radius)
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    far = np.where(inside > 0, root - b, -np.float32(np.inf)) / a
    return (-b - root) / a, far


def _inside_slab(start: Scalars, step: Scalars, half: float) -> tuple[Scalars, Scalars]:
    inverse = 1 / np.where(np.abs(step) < 1e-9, np.float32(1e-9), step)
    middle, reach = -start * inverse, np.float32(half) * np.abs(inverse)
    return middle - reach, middle + reach


def _rays(scene: Scene, wide: int) -> tuple[Float[np.ndarray, " 3"], Vectors]:
    """Returns the camera's position and unit directions `[3, wide, wide]` through pixel centres."""
    right, up, forward = scene.camera.axes().astype(np.float32)
    steps = ((np.arange(wide, dtype=np.float32) + 0.5) * 2 / wide - 1) / np.float32(
        scene.camera.focal
    )
    rays = (
        forward[:, None, None]
        + right[:, None, None] * steps[None, None, :]
        - up[:, None, None] * steps[None, :, None]
    )
    rays /= np.sqrt(1 + steps[None, :] ** 2 + steps[:, None] ** 2)
    return scene.camera.position().astype(np.float32), rays


def _first_hits(
    scene: Scene, eye: Float[np.ndarray, " 3"], rays: Vectors
) -> tuple[Scalars, Int[np.ndarray, "wide wide"]]:
    """Returns the distance and the object (-1: the ground) of each ray's first hit."""
    wide = rays.shape[1]
    distance = -eye[2] / rays[2]  # the camera looks down: every ray meets the ground
    ids = np.full((wide, wide), -1)
    for i, thing in enumerate(scene.objects):
        box = _pixels(scene, outline(thing), wide)
        near, far = interval(thing, eye[:, None, None], rays[:, *box])
        hit = (near < far) & (near < distance[box])
        distance[box] = np.where(hit, near, distance[box])
        ids[box] = np.where(hit, i, ids[box])
    return distance, ids


def _pixels(scene: Scene, points: Float[np.ndarray, "points 3"], wide: int) -> Box:
    """Returns the rows and columns that can show anything of the points' convex hull."""
    seen = scene.camera.project(points)[:, :2] * wide
    low = np.clip(np.floor(seen.min(axis=0) - 2), 0, wide).astype(int)
    high = np.clip(np.ceil(seen.max(axis=0) + 2), 0, wide).astype(int)
    return slice(low[1], high[1]), slice(low[0], high[0])


def _normals(scene: Scene, points: Vectors, ids: Int[np.ndarray, "wide wide"]) -> Vectors:
    normals = np.zeros_like(points)
    normals[2] = 1
    for i, thing in enumerate(scene.objects):
        hit = ids == i
        normals[:, hit] = _surface_normal(thing, points[:, hit])
    return normals


def _surface_normal(
    thing: Object, points: Float[np.ndarray, "3 points"]
) -> Float[np.ndarray, "3 points"]:
    offset = points - np.array(thing.centre, np.float32)[:, None]
    if thing.shape == "sphere":
        return offset / np.float32(thing.radius)
    flat = np.abs(offset[2]) / np.float32(thing.half_height)
    if thing.shape == "cylinder":
        across = np.hypot(offset[0], offset[1]) / np.float32(thing.half_width)
        side = offset * np.array([[1], [1], [0]], np.float32) / np.float32(thing.half_width)
        return np.where(flat >= across, _upright(offset), side)
    cos, sin = np.float32(math.cos(thing.rotation)), np.float32(math.sin(thing.rotation))
    axes = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
    local = axes @ offset
    face = np.argmax(np.abs(local), axis=0)
    sign = np.sign(np.take_along_axis(local, face[None], axis=0))
    return axes[face].T * sign


def _upright(offset: Float[np.ndarray, "3 points"]) -> Float[np.ndarray, "3 points"]:
    return np.sign(offset) * np.array([[0], [0], [1]], np.float32)


def _lit(
    scene: Scene, points: Vectors, light: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, "wide wide"]:
    """Returns 1 where the light is visible from a point, 0 in shadow."""
    lit = np.ones(points.shape[1:], np.float32)
    for thing in scene.objects:
        body = outline(thing)
        cast = body - light * (body[:, 2:] / light[2])  # where its edge falls on the ground
        box = _pixels(scene, np.concatenate([body, cast]), points.shape[1])
        near, far = interval(thing, points[:, *box], light[:, None, None])
        lit[box][(near < far) & (near > 0)] = 0
    return lit


def _shade(
    scene: Scene,
    rays: Vectors,
    points: Vectors,
    normals: Vectors,
    ids: Int[np.ndarray, "wide wide"],
    lit: Float[np.ndarray, "wide wide"],
    light: Float[np.ndarray, " 3"],
) -> Vectors:
    """Returns linear colours: Lambert shading, and a mirror's share on top of it for shiny objects.

    The ambient light is brighter from above. The highlight is that of Blinn 1977.
    """
    facing = np.maximum(np.tensordot(light, normals, 1), 0)
    brightness = AMBIENT * (0.75 + 0.25 * normals[2]) + DIFFUSE * facing * lit
    palette = np.array([ALBEDO[o.colour] for o in scene.objects] + [(GROUND,) * 3], np.float32)
    colour = np.take(palette.T, ids, axis=1) * brightness
    for i, thing in enumerate(scene.objects):
        if thing.material == "shiny":
            hit = ids == i
            colour[:, hit] += _gloss(rays[:, hit], points[:, hit], normals[:, hit], lit[hit], light)
    return colour


def _gloss(
    rays: Float[np.ndarray, "3 points"],
    points: Float[np.ndarray, "3 points"],
    normals: Float[np.ndarray, "3 points"],
    lit: Float[np.ndarray, " points"],
    light: Float[np.ndarray, " 3"],
) -> Float[np.ndarray, " points"]:
    """Returns what a polished surface adds: the light's highlight and mirrored surroundings.

    The surroundings are lamps above and the ground below, so that flat faces show gloss too.
    """
    half = light[:, None] - rays
    half /= np.linalg.norm(half, axis=0)
    highlight = HIGHLIGHT * np.maximum((half * normals).sum(0), 0) ** SHARPNESS * lit
    mirrored = rays - 2 * (rays * normals).sum(0) * normals
    upward = mirrored[2]
    # A ceiling of lamps in stripes at height 2.
    along = points + mirrored * ((2 - points[2]) / np.maximum(upward, 0.05))
    stripes = np.clip(2.5 * np.cos(2 * math.pi * (along[0] + along[1]) / 1.0), 0, 1)
    ceiling = np.where(upward > 0.05, 0.55 * stripes, 0)
    floor = np.where(upward < 0, 0.35 * np.clip(points[2] / 0.5, 0, 1), 0)
    return (highlight + 0.6 * ceiling + 0.5 * floor).astype(np.float32)
