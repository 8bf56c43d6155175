"""A small set of solids that are made: clouds of points on their surfaces, a folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from unified_mm.world.made import ensure_classes

CLASSES = ("ball", "box", "cone", "cylinder", "pyramid", "ring")
SOLIDS = {"train": 80, "val": 20}  # of each class
POINTS = 600  # of a solid
VERSION = 1  # raise it when the solids change


def ensure_solids(cache: Path) -> Path:
    """Returns the folder of the solids, which are written where they are not there yet."""

    def write(file: Path, kind: str, seed: int) -> None:
        np.save(file.with_suffix(".npy"), solid(kind, seed).astype(np.float32))

    return ensure_classes(cache / f"solids-{VERSION}", CLASSES, SOLIDS, write)


def solid(kind: str, seed: int) -> Float[np.ndarray, "points 3"]:
    """Returns points on a solid of a class, of any size, turned about z, with some noise."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, POINTS)
    around = np.stack([np.cos(angle), np.sin(angle), np.zeros(POINTS)], axis=1)
    up = np.array([0.0, 0.0, 1.0])
    height = rng.uniform(-1, 1, (POINTS, 1))
    if kind == "ball":
        found = around * np.sqrt(1 - height**2) + up * height
    elif kind == "ring":
        turn = rng.uniform(0, 2 * np.pi, (POINTS, 1))
        found = around * (1 + 0.35 * np.cos(turn)) + up * 0.35 * np.sin(turn)
    else:
        square = kind in ("box", "pyramid")
        edge = np.abs(around).max(1, keepdims=True) if square else 1.0
        # A part of the points is on the floor, and under a flat roof.
        flat = rng.random((POINTS, 1)) < 0.4
        inside = np.sqrt(rng.random((POINTS, 1)))
        if kind in ("cone", "pyramid"):
            radius = np.where(flat, inside, (1 - height) / 2)
            height = np.where(flat, -1.0, height)
        else:
            radius = np.where(flat, inside, 1.0)
            height = np.where(flat, np.sign(height), height)
        found = around / edge * radius + up * height
    found = found * rng.uniform(0.6, 1.4, 3) * rng.uniform(1, 5)
    turned = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(turned), np.sin(turned)
    found = found @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    return found + rng.normal(size=found.shape) * 0.02 * np.abs(found).max()
