"""The embedded world: objects on a plane, a camera, a light, and where each object is seen.

World coordinates: x and y on the ground, z up. The scale is such that an image is about 2 units
wide where the camera looks. Image coordinates: x to the right and y down, both in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

SHAPES = ("sphere", "cube", "cylinder")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black")
SIZES = ("large", "small")
MATERIALS = ("matte", "shiny")
ATTRIBUTES = {"size": SIZES, "material": MATERIALS, "colour": COLOURS, "shape": SHAPES}

# One shape a colour that train and val never show: what test_composition asks for.
HELD_OUT = tuple((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))

SPLITS = ("train", "val", "test_composition")  # the position is part of each scene's seed

Places = float | Float[np.ndarray, "..."]

# Half width and half height as shares of an object's radius, so that all shapes look equally big.
PROPORTIONS = {"sphere": (1.0, 1.0), "cube": (0.8, 0.8), "cylinder": (0.8, 0.95)}


@dataclass(frozen=True)
class WorldSpec:
    """The options of a world, which determine all its bytes.

    Attributes:
      image_size: the side of an image in pixels.
      train, val, test_composition: the number of scenes of each split.
      seed: seed of all draws.
      object_weights: how often a scene has 1, 2, ... objects.
      spans: the width of a large object as a share of the image's, by the number of objects.
      small_ratio: the width of a small object as a share of a large one's.
      supersample: rays a pixel along each side.
      version: changes with this package's drawing or wording.
    """

    image_size: int = 64
    train: int = 20000
    val: int = 1000
    test_composition: int = 1000
    seed: int = 0
    object_weights: tuple[float, ...] = (0.10, 0.35, 0.35, 0.20)
    spans: tuple[float, ...] = (0.48, 0.40, 0.33, 0.30)
    small_ratio: float = 0.62
    supersample: int = 2
    version: int = 1

    def __post_init__(self) -> None:
        if len(self.object_weights) != len(self.spans) or not self.spans:
            raise ValueError(
                f"WorldSpec: object_weights has {len(self.object_weights)} entries and spans "
                f"{len(self.spans)}; give one of each for every number of objects from 1 on"
            )
        if min(self.object_weights) < 0 or sum(self.object_weights) <= 0:
            raise ValueError(f"WorldSpec: object_weights {self.object_weights} are no weights")
        for name in ("image_size", "supersample"):
            if getattr(self, name) < 1:
                raise ValueError(f"WorldSpec: {name} is {getattr(self, name)}; it must be positive")
        for split in SPLITS:
            if self.count(split) < 0:
                raise ValueError(f"WorldSpec: {split} is {self.count(split)}; it must not be < 0")

    def count(self, split: str) -> int:
        """Returns the number of scenes of a split."""
        return int(getattr(self, split))


@dataclass(frozen=True)
class Object:
    """One object on the ground.

    Attributes:
      shape, colour, size, material: its attributes in words.
      x, y: its place on the ground.
      rotation: about z, in radians.
      radius: in world units.
    """

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    rotation: float
    radius: float

    @property
    def half_width(self) -> float:
        return self.radius * PROPORTIONS[self.shape][0]

    @property
    def half_height(self) -> float:
        return self.radius * PROPORTIONS[self.shape][1]

    @property
    def centre(self) -> tuple[float, float, float]:
        return (self.x, self.y, self.half_height)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at `(0, 0, height)`.

    Attributes:
      azimuth, elevation: angles in radians.
      distance: from the point that it looks at.
      focal: the focal length in half widths of the image.
      height: of the point that it looks at.
    """

    azimuth: float
    elevation: float
    distance: float
    focal: float
    height: float

    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Returns the unit vectors right, up and forward of the image, as rows."""
        ca, sa = math.cos(self.azimuth), math.sin(self.azimuth)
        ce, se = math.cos(self.elevation), math.sin(self.elevation)
        return np.array([[ca, sa, 0.0], [-sa * se, ca * se, ce], [-sa * ce, ca * ce, -se]])

    def position(self) -> Float[np.ndarray, " 3"]:
        return np.array([0.0, 0.0, self.height]) - self.distance * self.axes()[2]

    def project(self, points: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3"]:
        """Projects world points to (image x, image y, depth along the view)."""
        right, up, depth = np.moveaxis((points - self.position()) @ self.axes().T, -1, 0)
        scale = 0.5 * self.focal / depth
        return np.stack([0.5 + right * scale, 0.5 - up * scale, depth], axis=-1)


@dataclass(frozen=True)
class Scene:
    """Objects on the ground, seen by a camera under a light.

    Attributes:
      id: the image id.
      objects: from left to right in the image.
      camera: the camera.
      light: the unit vector towards the light.
    """

    id: int
    objects: tuple[Object, ...]
    camera: Camera
    light: tuple[float, float, float]

    def places(self) -> Float[np.ndarray, "objects 3"]:
        """Returns image x, image y and depth of each object's centre."""
        return self.camera.project(np.array([thing.centre for thing in self.objects]))


def _unit_hull(shape: str) -> Float[np.ndarray, "points 3"]:
    """Returns points whose convex hull is an object of radius 1 about its centre, `rotation` 0."""
    width, height = PROPORTIONS[shape]
    if shape == "cube":
        turn = math.pi / 4 + math.pi / 2 * np.arange(4)
        rings = [(width * math.sqrt(2), -height), (width * math.sqrt(2), height)]
    elif shape == "cylinder":
        turn = math.pi / 8 * np.arange(16)
        rings = [(width, -height), (width, height)]
    else:
        turn = math.pi / 8 * np.arange(16)
        rings = [(math.cos(tilt), math.sin(tilt)) for tilt in math.pi / 12 * np.arange(-6, 7)]
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.concatenate(
        [np.column_stack([circle * reach, np.full(len(turn), z)]) for reach, z in rings]
    )


HULLS = {shape: _unit_hull(shape) for shape in SHAPES}


def outline(thing: Object) -> Float[np.ndarray, "points 3"]:
    """Returns points whose convex hull is the object (for a sphere, up to 2 % of its radius)."""
    return _outlines(thing.shape, thing.x, thing.y, thing.rotation, thing.radius)


def _outlines(shape: str, x: Places, y: Places, rotation: Places, radius: Places) -> np.ndarray:
    """Returns `outline` of objects of one shape: [..., points, 3] for arguments of shape [...]."""
    x, y, rotation, radius = (np.asarray(number)[..., None] for number in (x, y, rotation, radius))
    along, across, up = HULLS[shape].T
    cos, sin = radius * np.cos(rotation), radius * np.sin(rotation)
    points = (
        x + cos * along - sin * across,
        y + sin * along + cos * across,
        radius * (PROPORTIONS[shape][1] + up),
    )
    return np.stack(points, axis=-1)


# Framing. Sides are said of every pair, so no two centres are closer than this in image x.
MIN_SIDE_GAP = 0.11
MARGIN = 0.015  # between an object and the picture's edge
MAX_COVERED = 0.15  # share of an object's box under the boxes of nearer ones
DRAWS = 32  # placements tried at once
MAX_DRAWS = 64000  # a handful of scenes in a million need more than a few thousand


def sample_scene(spec: WorldSpec, split: str, index: int) -> Scene:
    """Returns the scene of a split at an index: a function of `(spec, split, index)` alone.

    Attributes, camera and light are drawn first; places are drawn again until every object lies
    completely in the image, hardly covered, with clear sides.

    Raises:
      ValueError: the split is unknown, or the spec's objects do not fit in an image.
    """
    if split not in SPLITS:
        raise ValueError(f"world: no split {split!r}; there are {', '.join(SPLITS)}")
    number = SPLITS.index(split)
    rng = np.random.default_rng(np.random.SeedSequence([spec.seed, number, index]))
    weights = np.array(spec.object_weights) / sum(spec.object_weights)
    count = 1 + int(rng.choice(len(weights), p=weights))
    camera, light = _sample_view(rng)
    words = _sample_words(rng, count, compose=split == "test_composition")
    identity = number * 1_000_000 + index
    for _ in range(MAX_DRAWS // DRAWS):
        drawn = _draw_places(rng, spec, camera, words)
        framed = np.flatnonzero(_framed(camera, words, drawn))
        if len(framed):
            objects = _left_to_right(camera, words, drawn[:, framed[0]])
            return Scene(identity, objects, camera, light)
    raise ValueError(
        f"world: {count} objects of span {spec.spans[count - 1]} found no place in {split} scene "
        f"{index} within {MAX_DRAWS} draws; make WorldSpec.spans smaller"
    )


def _sample_view(rng: np.random.Generator) -> tuple[Camera, tuple[float, float, float]]:
    """Returns a camera that looks down by 30 to 38 degrees, and a light from its side."""
    azimuth = rng.uniform(-0.35, 0.35)
    elevation = math.radians(rng.uniform(30, 38))
    focal = rng.uniform(2.6, 3.2)
    camera = Camera(azimuth, elevation, focal * rng.uniform(0.97, 1.05), focal, 0.3)
    # Towards the camera's left or right, so that shadows fall clear of what casts them.
    turn = azimuth - math.pi / 2 + rng.choice([-1, 1]) * math.radians(rng.uniform(20, 65))
    height = math.radians(rng.uniform(45, 62))
    flat = math.cos(height)
    return camera, (flat * math.cos(turn), flat * math.sin(turn), math.sin(height))


def _sample_words(rng: np.random.Generator, count: int, compose: bool) -> list[dict[str, str]]:
    """Returns four attributes for each object, no two objects alike.

    With `compose`, one object has a held-out pair of colour and shape; without, none has.
    """
    words: list[dict[str, str]] = []
    while len(words) < count:
        word = {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}
        held_out = (word["colour"], word["shape"]) in HELD_OUT
        if held_out == (compose and not words) and word not in words:
            words.append(word)
    return words


def _draw_places(
    rng: np.random.Generator, spec: WorldSpec, camera: Camera, words: list[dict[str, str]]
) -> Float[np.ndarray, "4 draws objects"]:
    """Returns x, y, rotation and radius: columns across the image in random order, at any depth."""
    count = len(words)
    shape = (DRAWS, count)
    right, forward = camera.axes()[0], camera.axes()[2] / math.cos(camera.elevation)
    reach = (0.0, 0.0, 0.68, 0.74, 0.78)[min(count, 4)]
    columns = rng.permuted(np.tile(np.linspace(-reach, reach, count), (DRAWS, 1)), axis=1)
    across = columns + rng.uniform(-0.2, 0.2, shape)
    along = rng.uniform(*((-0.15, 0.15) if count == 1 else (-1.0, 1.3)), shape)
    # A corner of a cube towards the camera, so that three faces show.
    rotation = camera.azimuth + np.radians(rng.uniform(20, 70, shape))
    sizes = np.array([spec.small_ratio if word["size"] == "small" else 1.0 for word in words])
    radius = spec.spans[count - 1] * sizes * rng.uniform(0.96, 1.04, shape)
    x, y = (across * right[i] + along * forward[i] for i in range(2))
    return np.stack([x, y, rotation, radius])


def _framed(
    camera: Camera, words: list[dict[str, str]], drawn: Float[np.ndarray, "4 draws objects"]
) -> Bool[np.ndarray, " draws"]:
    """Returns which draws show every object completely, hardly covered, and with clear sides."""
    x, y, _, radius = drawn
    shapes = [word["shape"] for word in words]
    heights = radius * [PROPORTIONS[shape][1] for shape in shapes]
    seen = camera.project(np.stack([x, y, heights], axis=-1))
    gaps = np.diff(np.sort(seen[..., 0], axis=1), axis=1)
    clear = (gaps >= MIN_SIDE_GAP).all(axis=1) & ~_touching(shapes, x, y, radius)
    # Outlines cost the most: only of draws that are good so far.
    left = np.flatnonzero(clear)
    boxes = np.stack(
        [_boxes(camera, _outlines(shape, *drawn[:, left, i])) for i, shape in enumerate(shapes)],
        axis=1,
    )
    inside = (boxes.min(axis=(1, 2)) >= MARGIN) & (boxes.max(axis=(1, 2)) <= 1 - MARGIN)
    clear[left] = inside & (_covered(boxes, seen[left, :, 2]) <= MAX_COVERED).all(axis=1)
    return clear


def _touching(
    shapes: list[str],
    x: Float[np.ndarray, "draws objects"],
    y: Float[np.ndarray, "draws objects"],
    radius: Float[np.ndarray, "draws objects"],
) -> Bool[np.ndarray, " draws"]:
    """Returns whether the ground circles of two objects meet, for each draw."""
    corner = {"sphere": 1.0, "cube": math.sqrt(2), "cylinder": 1.0}
    reach = radius * [PROPORTIONS[shape][0] * corner[shape] for shape in shapes]
    first, second = np.triu_indices(len(shapes), 1)
    apart = np.hypot(x[:, first] - x[:, second], y[:, first] - y[:, second])
    return (apart < reach[:, first] + reach[:, second]).any(axis=1)


def _boxes(
    camera: Camera, points: Float[np.ndarray, "draws points 3"]
) -> Float[np.ndarray, "draws 4"]:
    """Returns boxes around objects in the image: left, top, right, bottom in image coordinates."""
    seen = camera.project(points)[..., :2]
    return np.concatenate([seen.min(axis=1), seen.max(axis=1)], axis=1)


def _covered(
    boxes: Float[np.ndarray, "draws objects 4"], depths: Float[np.ndarray, "draws objects"]
) -> Float[np.ndarray, "draws objects"]:
    """Returns the share of each object's box under the boxes of nearer ones, as an upper bound."""
    low, high = boxes[..., :2], boxes[..., 2:]
    shared_low = np.maximum(low[:, :, None], low[:, None])
    shared_high = np.minimum(high[:, :, None], high[:, None])
    areas = np.clip(shared_high - shared_low, 0, None).prod(axis=-1)
    shared = areas / (high - low).prod(axis=-1)[:, :, None]
    nearer = depths[:, None, :] < depths[:, :, None]
    return (shared * nearer).sum(axis=2)


def _left_to_right(
    camera: Camera, words: list[dict[str, str]], place: Float[np.ndarray, "4 objects"]
) -> tuple[Object, ...]:
    objects = [
        Object(**word, x=x, y=y, rotation=rotation, radius=radius)
        for word, (x, y, rotation, radius) in zip(words, place.T.tolist(), strict=True)
    ]
    seen = camera.project(np.array([thing.centre for thing in objects]))
    return tuple(objects[i] for i in np.argsort(seen[:, 0]))
