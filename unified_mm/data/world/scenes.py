"""What the embedded world holds: objects on a plane, a camera, a light, and where each one is seen.

World coordinates: x and y on the ground, z up. The scale is such that a picture is about 2 units
wide where the camera looks. Image coordinates: x to the right and y down, both in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

SHAPES = ("sphere", "cube", "cylinder")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black")
SIZES = ("large", "small")
MATERIALS = ("matte", "shiny")
ATTRIBUTES = {"size": SIZES, "material": MATERIALS, "colour": COLOURS, "shape": SHAPES}

# One shape a colour that train and val never show: what test_composition asks for.
HELD_OUT = tuple((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))

SPLITS = ("train", "val", "test_composition")  # the position is part of each scene's seed

# Half width and half height as shares of an object's radius, so that all shapes look equally big.
PROPORTIONS = {"sphere": (1.0, 1.0), "cube": (0.8, 0.8), "cylinder": (0.8, 0.95)}


@dataclass(frozen=True)
class WorldSpec:
    """Everything that decides the bytes of a world.

    `train`, `val`, `test_composition`: number of scenes of each split. `object_weights`: how often
    a scene has 1, 2, ... objects. `spans`: the width of a large object as a share of the picture's,
    by the number of objects; a small one is `small_ratio` of it. `version` changes with this
    package's drawing or wording.
    """

    image_size: int = 64
    train: int = 12000
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
        """The number of scenes of a split."""
        return int(getattr(self, split))


@dataclass(frozen=True)
class Object:
    """One thing on the ground: its four words, its place, its turn about z and its radius."""

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
    """A pinhole camera that looks at `(0, 0, height)`; angles in radians, focal in half widths."""

    azimuth: float
    elevation: float
    distance: float
    focal: float
    height: float

    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rows: the unit vectors right, up and forward of the picture."""
        ca, sa = math.cos(self.azimuth), math.sin(self.azimuth)
        ce, se = math.cos(self.elevation), math.sin(self.elevation)
        return np.array([[ca, sa, 0.0], [-sa * se, ca * se, ce], [-sa * ce, ca * ce, -se]])

    def position(self) -> Float[np.ndarray, " 3"]:
        return np.array([0.0, 0.0, self.height]) - self.distance * self.axes()[2]

    def project(self, points: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, "P 3"]:
        """World points to (image x, image y, depth along the view)."""
        right, up, depth = ((points - self.position()) @ self.axes().T).T
        scale = 0.5 * self.focal / depth
        return np.stack([0.5 + right * scale, 0.5 - up * scale, depth], axis=1)


@dataclass(frozen=True)
class Scene:
    """Objects from left to right as seen, the camera, and the unit vector towards the light."""

    id: int
    objects: tuple[Object, ...]
    camera: Camera
    light: tuple[float, float, float]

    def places(self) -> Float[np.ndarray, "N 3"]:
        """Image x, image y and depth of each object's centre."""
        return self.camera.project(np.array([thing.centre for thing in self.objects]))


def outline(thing: Object) -> Float[np.ndarray, "P 3"]:
    """Points whose convex hull is the object (for a sphere, up to 1 % of its radius)."""
    height = thing.half_height
    if thing.shape == "cube":
        turn = thing.rotation + math.pi / 4 + math.pi / 2 * np.arange(4)
        rings = [
            (thing.half_width * math.sqrt(2), -height),
            (thing.half_width * math.sqrt(2), height),
        ]
    else:
        turn = math.pi / 8 * np.arange(16)
        if thing.shape == "cylinder":
            rings = [(thing.half_width, -height), (thing.half_width, height)]
        else:
            tilt = math.pi / 12 * np.arange(-6, 7)
            rings = [(thing.radius * math.cos(a), thing.radius * math.sin(a)) for a in tilt]
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    points = [np.column_stack([ring * width, np.full(len(turn), z)]) for width, z in rings]
    return np.concatenate(points) + np.array(thing.centre)


def screen_box(camera: Camera, thing: Object) -> tuple[float, float, float, float]:
    """The box around an object in the picture: left, top, right, bottom in image coordinates."""
    seen = camera.project(outline(thing))
    left, top = seen[:, :2].min(axis=0)
    right, bottom = seen[:, :2].max(axis=0)
    return float(left), float(top), float(right), float(bottom)


# Framing. Sides are said of every pair, so no two centres are closer than this in image x.
MIN_SIDE_GAP = 0.11
MARGIN = 0.015  # between an object and the picture's edge
MAX_COVERED = 0.15  # share of an object's box under the boxes of nearer ones
ATTEMPTS = 3000


def sample_scene(spec: WorldSpec, split: str, index: int) -> Scene:
    """The scene of a split at an index: a function of `(spec, split, index)` alone.

    Attributes, camera and light are drawn first; places are drawn again until every object lies
    wholly in the picture, hardly covered, with clear sides.

    Raises ValueError for an unknown split or where the spec's objects do not fit in a picture.
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
    for _ in range(ATTEMPTS):
        objects = _place(rng, spec, camera, words)
        if _framed(camera, objects):
            order = np.argsort(camera.project(np.array([o.centre for o in objects]))[:, 0])
            return Scene(identity, tuple(objects[i] for i in order), camera, light)
    raise ValueError(
        f"world: {count} objects of span {spec.spans[count - 1]} found no place in {split} scene "
        f"{index} within {ATTEMPTS} attempts; make WorldSpec.spans smaller"
    )


def _sample_view(rng: np.random.Generator) -> tuple[Camera, tuple[float, float, float]]:
    """A camera that looks down by 30 to 38 degrees, and a light from its side of the scene."""
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
    """Four words an object, no two objects alike; with `compose`, one object of a held-out pair."""
    words: list[dict[str, str]] = []
    while len(words) < count:
        word = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
        held_out = (word["colour"], word["shape"]) in HELD_OUT
        if held_out == (compose and not words) and word not in words:
            words.append(word)
    return words


def _place(
    rng: np.random.Generator, spec: WorldSpec, camera: Camera, words: list[dict[str, str]]
) -> list[Object]:
    """One draw of places: columns across the picture in random order, any depth."""
    count = len(words)
    right, forward = camera.axes()[0], camera.axes()[2] / math.cos(camera.elevation)
    reach = (0.0, 0.55, 0.68, 0.74, 0.78)[min(count, 4) if count > 1 else 0]
    columns = np.linspace(-reach, reach, count)[rng.permutation(count)]
    objects = []
    for word, column in zip(words, columns, strict=True):
        radius = spec.spans[count - 1] * (spec.small_ratio if word["size"] == "small" else 1.0)
        radius *= rng.uniform(0.96, 1.04)
        across = column + rng.uniform(-0.2, 0.2)
        along = rng.uniform(-0.15, 0.15) if count == 1 else rng.uniform(-1.0, 1.3)
        x, y = across * right[:2] + along * forward[:2]
        # A corner of a cube towards the camera, so that three faces show.
        rotation = camera.azimuth + math.radians(rng.uniform(20, 70))
        objects.append(Object(**word, x=float(x), y=float(y), rotation=rotation, radius=radius))
    return objects


def _framed(camera: Camera, objects: list[Object]) -> bool:
    places = camera.project(np.array([thing.centre for thing in objects]))
    if len(objects) > 1 and np.diff(np.sort(places[:, 0])).min() < MIN_SIDE_GAP:
        return False
    boxes = np.array([screen_box(camera, thing) for thing in objects])
    if boxes.min() < MARGIN or boxes.max() > 1 - MARGIN:
        return False
    return all(
        sum(_shared(box, boxes[j]) for j in range(len(objects)) if places[j, 2] < places[i, 2])
        <= MAX_COVERED
        for i, box in enumerate(boxes)
    ) and not _touching(objects)


def _shared(box: Float[np.ndarray, " 4"], other: Float[np.ndarray, " 4"]) -> float:
    """The share of `box` that lies under `other`."""
    overlap = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
    return float(overlap.prod() / (box[2:] - box[:2]).prod())


def _touching(objects: list[Object]) -> bool:
    """Whether the ground circles of two objects meet."""
    reach = [o.half_width * (math.sqrt(2) if o.shape == "cube" else 1.0) for o in objects]
    return any(
        math.hypot(a.x - b.x, a.y - b.y) < reach[i] + reach[j]
        for i, a in enumerate(objects)
        for j, b in enumerate(objects)
        if i < j
    )
