"""A small set of clips that are drawn: two solids that move one way, and hit or pass each other.

The faster one comes from behind. Where they hit they exchange their speeds, as equal masses do;
else it overtakes in a lane of its own. Either, played backwards, is a clip of the other direction
that is as likely: so no single picture tells the direction, and who tells it has seen motion.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from unified_mm.world.made import ensure_folder, seed_of

COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.7, 0.2),
    "blue": (0.15, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "purple": (0.6, 0.2, 0.75),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("ball", "cube", "cone")
SOLIDS = tuple(itertools.product(COLOURS, SHAPES))
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
EVENTS = {"hit": "pass", "pass": "hit"}
SENTENCES = (
    "a {} and a {} move {} and {} each other",
    "moving {2}, a {0} and a {1} {3} each other",
)
CLIPS = {"train": 2600, "val": 400}
SIZE = 48  # pixels on a side
FRAMES, FPS = 16, 8.0
SECONDS = FRAMES / FPS
RADIUS = 0.1  # of a solid, in widths of the picture
FAST, SLOW = 0.28, 0.1  # widths a second
VERSION = 2  # raise it when the clips change


@dataclass(frozen=True)
class Scene:
    """What is seen and said of a clip.

    Attributes:
      solids: colour and shape of the one behind and of the one in front, at the beginning.
      direction: of both.
      event: 'hit' or 'pass'.
      when: seconds until then.
      where: of the point of the event along the direction, in widths from its beginning.
      lanes: of each solid, across the direction.
      grey: of the ground.
      sentence: number of `SENTENCES`.
      swapped: whether the one in front is named first.
    """

    solids: tuple[tuple[str, str], tuple[str, str]]
    direction: str
    event: str
    when: float
    where: float
    lanes: tuple[float, float]
    grey: float
    sentence: int
    swapped: bool

    def caption(self, **changed: str) -> str:
        """Returns its caption; with another `direction` or `event`, that made false."""
        one, other = (" ".join(each) for each in self.solids[:: -1 if self.swapped else 1])
        said = {"direction": self.direction, "event": self.event, **changed}
        return SENTENCES[self.sentence].format(one, other, said["direction"], said["event"])


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene in which both solids stay within the picture."""
    one, other = rng.choice(len(SOLIDS), 2, replace=False)
    event = str(rng.choice(list(EVENTS)))
    when = rng.uniform(0.3, 0.7) * SECONDS
    apart = RADIUS if event == "hit" else 0.0
    behind, ahead = RADIUS + apart + FAST * when, RADIUS + apart + FAST * (SECONDS - when)
    lane = rng.uniform(RADIUS, 1 - RADIUS)
    lanes = (lane, lane)
    if event == "pass":
        between = rng.uniform(2.2, 4.0) * RADIUS
        lane = rng.uniform(RADIUS, 1 - RADIUS - between)
        lanes = (lane, lane + between) if rng.random() < 0.5 else (lane + between, lane)
    return Scene(
        (SOLIDS[one], SOLIDS[other]),
        str(rng.choice(list(DIRECTIONS))),
        event,
        when,
        rng.uniform(behind, 1 - ahead),
        lanes,
        rng.uniform(0.3, 0.5),
        int(rng.integers(len(SENTENCES))),
        bool(rng.random() < 0.5),
    )


def places(scene: Scene, time: float) -> Float[np.ndarray, "2 2"]:
    """Returns x and y of both solids at a time, in widths from the left and from the top."""
    since = time - scene.when
    speeds = (FAST, SLOW)
    if scene.event == "hit":
        speeds = speeds if since < 0 else (SLOW, FAST)
    apart = RADIUS if scene.event == "hit" else 0.0
    along = np.array([scene.where - apart, scene.where + apart]) + np.array(speeds) * since
    x, y = DIRECTIONS[scene.direction]
    along = along if x + y > 0 else 1 - along
    return np.stack([along, scene.lanes] if x else [scene.lanes, along], axis=1)


def draw(scene: Scene) -> UInt8[np.ndarray, "S height width 3"]:
    """Returns the frames of a scene."""
    axis = (np.arange(SIZE) + 0.5) / SIZE
    y, x = np.meshgrid(axis, axis, indexing="ij")
    ground = np.repeat((scene.grey * (1 - 0.3 * y))[..., None], 3, axis=2)
    frames = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    # In the middle of its time, so that a clip played backwards is one of the same times.
    for number in range(FRAMES):
        picture = ground
        centres = places(scene, (number + 0.5) / FPS)
        for (colour, shape), centre in zip(scene.solids, centres, strict=True):
            dx, dy = (x - centre[0]) / RADIUS, (y - centre[1]) / RADIUS
            inside = {
                "ball": 1 - np.hypot(dx, dy),
                "cube": 0.85 - np.maximum(np.abs(dx), np.abs(dy)),
                "cone": np.minimum(0.9 - dy, (dy + 1) / 2 - np.abs(dx)),
            }[shape]
            cover = np.clip(inside * RADIUS * SIZE + 0.5, 0, 1)[..., None]
            light = np.clip(0.8 - 0.25 * (dx + dy), 0.3, 1)[..., None]
            picture = (1 - cover) * picture + cover * light * np.array(COLOURS[colour])
        frames[number] = np.rint(255 * picture)
    return frames


def ensure_clips(cache: Path) -> Path:
    """Returns the folder of the clips, which are drawn where they are not there yet.

    It is in the layout of COCO captions, with `video` in place of `file_name`.
    """
    return ensure_folder(cache / f"clips-{VERSION}", _write_clips)


def _write_clips(made: Path) -> None:
    print(f"drawing {sum(CLIPS.values()):,} clips, once", flush=True)
    (made / "annotations").mkdir()
    for split, count in CLIPS.items():
        (made / "clips" / split).mkdir(parents=True)
        _write_split(made, split, count)


def scene_of(split: str, number: int) -> Scene:
    """Returns a scene of a split, which its number decides."""
    return sample_scene(np.random.default_rng(seed_of(f"{split} {number}")))


def _write_split(folder: Path, split: str, count: int) -> None:
    videos: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    foils: list[dict[str, Any]] = []
    for number in range(count):
        scene, name = scene_of(split, number), f"clips/{split}/{number}.npz"
        np.savez_compressed(folder / name, frames=draw(scene), fps=FPS)
        videos.append({"id": number, "video": name})
        caption = scene.caption()
        captions.append({"id": number, "image_id": number, "caption": caption})
        false = {
            "direction": scene.caption(direction=OPPOSITE[scene.direction]),
            "event": scene.caption(event=EVENTS[scene.event]),
        }
        foils += [
            {"image_id": number, "caption": caption, "foil": foil, "kind": kind}
            for kind, foil in false.items()
        ]
    listed = {"info": {"directional": True}, "images": videos, "annotations": captions}
    annotations = folder / "annotations"
    (annotations / f"captions_{split}.json").write_text(json.dumps(listed))
    (annotations / f"foils_{split}.json").write_text(json.dumps(foils))
