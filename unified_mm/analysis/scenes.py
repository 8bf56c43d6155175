"""Labels of the rendered world's pictures: the attributes of the objects in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from unified_mm.analysis.probes import Target, yes_or_no
from unified_mm.files import read_json
from unified_mm.world.scenes import ATTRIBUTES

COUNT = "objects/count"
Scene = Mapping[str, Any]  # 'objects', each with its attributes; see `world.build.scene_graph`


def read_scenes(folder: str | os.PathLike[str], split: str) -> dict[int | str, Scene]:
    """Reads the scenes of a split of the rendered world, by image id.

    Raises:
      FileNotFoundError: the folder has no scenes, because it is not the rendered world.
      ValueError: the file is malformed.
    """
    path = Path(folder) / "annotations" / f"scenes_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no annotations/scenes_{split}.json, which says what is in each picture "
            "and comes with the embedded world alone; give --images=DIR with a directory per class"
        )
    content = read_json(path)
    try:
        return {scene["image_id"]: scene for scene in content["scenes"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: it holds no list of scenes with image ids") from error


def scene_targets(scenes: Sequence[Scene]) -> list[Target]:
    """Returns the labels of each scene that probes have to predict.

    'objects/count' is the number of objects; 'colour/red' and the like say whether any object has
    that value, for each attribute of the world.
    """
    counts = np.array([len(scene["objects"]) for scene in scenes])
    most = max(4, int(counts.max()))
    names = tuple(str(number) for number in range(1, most + 1))
    targets = [Target(COUNT, names, counts - 1)]
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            holds = np.array([value in attribute_values(scene, attribute) for scene in scenes])
            targets.append(yes_or_no(f"{attribute}/{value}", holds))
    return targets


def attribute_values(scene: Scene, attribute: str) -> set[str]:
    """Returns the values of an attribute that the objects of a scene have."""
    return {str(thing[attribute]) for thing in scene["objects"]}


def scene_groups(scenes: Sequence[Scene]) -> dict[str, Bool[np.ndarray, " scenes"]]:
    """Returns which scenes have each value of each attribute, and each number of objects."""
    groups = {}
    for target in scene_targets(scenes):
        if target.name == COUNT:
            for number, name in enumerate(target.classes):
                groups[f"objects/{name}"] = target.labels == number
        else:
            groups[target.name] = target.labels == 1
    return groups
