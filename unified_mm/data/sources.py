"""Where examples come from: a folder of the user's, or else the embedded world, plainly said."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unified_mm.data import coco
from unified_mm.data.manifest import build_manifest, with_questions
from unified_mm.data.records import Manifest
from unified_mm.registry import resolve

BUILT_IN = {
    "auto": "unified_mm.data.sources:find_source",
    "coco": "unified_mm.data.sources:given_folder",
    "world": "unified_mm.data.sources:embedded_world",
}
# Where a COCO folder is looked for when none is given.
PLACES = ("data/coco", "data/coco2017", "~/data/coco", "~/datasets/coco")

WORLD_BANNER = (
    "NO DATA DIRECTORY WAS GIVEN, so this run uses the embedded world: small rendered scenes of "
    "spheres, cubes and cylinders with generated captions. Its scores say nothing about "
    "photographs. For your own data: --config.data.dir=FOLDER (COCO captions layout)."
)


@runtime_checkable
class Source(Protocol):
    """A named origin of examples, split by split."""

    name: str
    folder: str
    banner: str | None  # what nobody may overlook about this data

    def splits(self) -> Sequence[str]:
        """The splits that are there."""

    def manifest(self, split: str) -> Manifest:
        """The validated examples of a split."""

    def foils(self, split: str) -> Sequence[coco.Foil]:
        """Captions made false by one word; empty where there are none."""

    def questions(self, split: str) -> Sequence[coco.Question]:
        """Questions with answers; empty where there are none."""


class CocoFolder:
    """A folder in the layout of MS-COCO captions."""

    def __init__(
        self, folder: Path, data: Any, *, name: str = "coco", banner: str | None = None
    ) -> None:
        self.name = name
        self.folder = str(folder)
        self.banner = banner
        self._cache = cache_folder(data)
        self._max_bad_share = float(data.max_bad_share)
        self._with_questions = float(data.question_share) > 0
        self._splits = coco.find_splits(folder)

    def splits(self) -> Sequence[str]:
        return tuple(self._splits)

    def manifest(self, split: str) -> Manifest:
        manifest = build_manifest(
            self.folder,
            split,
            source=self.name,
            cache=self._cache,
            max_bad_share=self._max_bad_share,
        )
        return with_questions(manifest, self.questions(split)) if self._with_questions else manifest

    def foils(self, split: str) -> Sequence[coco.Foil]:
        return coco.read_foils(self.folder, split) if coco.has_foils(self.folder, split) else ()

    def questions(self, split: str) -> Sequence[coco.Question]:
        """Read where `data.question_share` asks for them."""
        if not (self._with_questions and coco.has_questions(self.folder, split)):
            return ()
        return coco.read_questions(self.folder, split)


def open_source(data: Any) -> Source:
    """The source that `config.data` asks for.

    Raises:
      FileNotFoundError, ValueError: a folder that was given and is wrong; never a fallback.
    """
    return resolve("data source", data.source, BUILT_IN)(data)


def find_source(data: Any) -> Source:
    """The folder given, else a documented place, else the embedded world."""
    if data.dir:
        return given_folder(data)
    for place in PLACES:
        folder = Path(place).expanduser()
        if (folder / "annotations").is_dir():
            return CocoFolder(folder, data)
    return embedded_world(data)


def given_folder(data: Any) -> Source:
    """`data.dir`, which must be there."""
    if not data.dir:
        raise ValueError("data.source='coco' needs data.dir, a folder in COCO captions layout")
    return CocoFolder(Path(data.dir).expanduser(), data)


def embedded_world(data: Any) -> Source:
    """The world that this package renders, made on first use and kept in the cache."""
    from unified_mm.data.world.build import ensure_world
    from unified_mm.data.world.scenes import WorldSpec

    if data.dir:
        raise ValueError(f"data.source='world' reads no folder, but data.dir={data.dir!r} is given")
    options = dict(data.world)
    spec = WorldSpec(image_size=int(data.image_size), **options)
    folder = ensure_world(spec, cache_folder(data))
    return CocoFolder(folder, data, name="world", banner=WORLD_BANNER)


def cache_folder(data: Any) -> Path:
    """`data.cache_dir`, else $UNIFIED_MM_CACHE, else the user's cache."""
    if data.cache_dir:
        return Path(data.cache_dir).expanduser()
    if os.environ.get("UNIFIED_MM_CACHE"):
        return Path(os.environ["UNIFIED_MM_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "unified_mm"
