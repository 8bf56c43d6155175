"""Sources of examples: a folder of the user's, or else the embedded world, with a notice."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

from unified_mm.data import coco
from unified_mm.data.manifest import Sidecar, build_manifest, with_questions
from unified_mm.data.records import Manifest
from unified_mm.files import naming, user_path
from unified_mm.registry import resolve

BUILT_IN = {
    "auto": "unified_mm.data.sources:find_source",
    "coco": "unified_mm.data.sources:given_folder",
    "tfds": "unified_mm.data.tfds_source:open_dataset",
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
    """A named origin of examples, split by split.

    Attributes:
      name: the name of the source, such as 'coco'.
      folder: where the data lie.
      banner: a notice to show wherever this data is used, or None.
    """

    name: str
    folder: str
    banner: str | None  # what nobody may overlook about this data

    def splits(self) -> Sequence[str]:
        """Returns the names of the splits."""

    def manifest(self, split: str) -> Manifest:
        """Returns the validated examples of a split."""

    def foils(self, split: str) -> Sequence[coco.Foil]:
        """Returns captions made false by one word; empty if there are none."""

    def questions(self, split: str) -> Sequence[coco.Question]:
        """Returns questions with answers; empty if there are none."""


class AnnotatedFolder:
    """Images with captions, and in `annotations/` files of questions and foils on them.

    Subclasses read the captions.
    """

    def __init__(
        self, folder: Path, splits: Sequence[str], data: Any, *, name: str, banner: str | None
    ) -> None:
        self.name = name
        self.folder = str(folder)
        self.banner = banner
        self._cache = cache_folder(data)
        self._max_bad_share = float(data.max_bad_share)
        self._max_orphans = self._max_bad_share  # share that may be on unlisted images
        self._asking = asking_field(data)
        self._questions: dict[str, Sequence[coco.Question]] = {}  # those that were read
        self._splits = tuple(splits)

    def splits(self) -> Sequence[str]:
        return self._splits

    def manifest(self, split: str) -> Manifest:
        """Returns the validated examples of a split, with the questions that training asks for.

        Foils, and questions that were read, are checked with it: those on images that are not
        listed are among its problems.
        """
        if self._asking:
            self.questions(split)
        questions = self._questions.get(split, ())
        manifest = self._build(split, self._beside_all(split, questions))
        return with_questions(manifest, questions) if self._asking else manifest

    def captioned(self, split: str) -> Manifest:
        """Returns the validated examples of a split with captions alone.

        Foils and questions are checked too.
        """
        return self._build(split, self._beside_all(split, self.questions(split)))

    def _build(self, split: str, sidecars: Sequence[Sidecar]) -> Manifest:
        raise NotImplementedError

    def foils(self, split: str) -> Sequence[coco.Foil]:
        return coco.read_foils(self.folder, split) if coco.has_foils(self.folder, split) else ()

    def questions(self, split: str) -> Sequence[coco.Question]:
        if split not in self._splits or not coco.has_questions(self.folder, split):
            return ()
        if split not in self._questions:
            self._questions[split] = coco.read_questions(self.folder, split)
        return self._questions[split]

    def no_questions(self, split: str) -> str:
        """Returns an error message: the split has no questions, and what was looked for."""
        return coco.no_questions(self.folder, split)

    def _beside_all(self, split: str, questions: Sequence[coco.Question]) -> tuple[Sidecar, ...]:
        return (
            self._beside("foil", self.foils(split), self._max_orphans),
            self._beside("question", questions, self._share_of_questions(split)),
        )

    def _beside(
        self, what: str, members: Sequence[coco.Foil] | Sequence[coco.Question], share: float
    ) -> Sidecar:
        return Sidecar(what, [member.image_id for member in members], share)

    def _share_of_questions(self, split: str) -> float:
        """Returns the share of questions allowed on unlisted images: 1 for VQA v2's own files."""
        return 1.0 if coco.questions_serve_others(self.folder, split) else self._max_orphans


class CocoFolder(AnnotatedFolder):
    """A folder in the layout of MS-COCO captions."""

    def __init__(
        self, folder: Path, data: Any, *, name: str = "coco", banner: str | None = None
    ) -> None:
        splits = tuple(coco.find_splits(folder))
        super().__init__(folder, splits, data, name=name, banner=banner)

    def _build(self, split: str, sidecars: Sequence[Sidecar]) -> Manifest:
        return build_manifest(
            self.folder,
            split,
            source=self.name,
            cache=self._cache,
            max_bad_share=self._max_bad_share,
            sidecars=sidecars,
        )


def asking_field(data: Any) -> str:
    """Returns the field of `data` that asks for questions to train on, '' if none does."""
    if float(data.question_share) > 0:
        return f"data.question_share={data.question_share}"
    return "data.documents.questions" if data.documents.questions else ""


def refuse_no_questions(source: Source, split: str, field: str) -> NoReturn:
    """Raises ValueError, as `field` asks for questions and a split has none."""
    own = getattr(source, "no_questions", None)
    said = own(split) if own else f"{source.name} has none for the split {split!r}"
    raise ValueError(f"{field} asks for questions: {said}")


def open_source(data: Any) -> Source:
    """Returns the source that `config.data` asks for.

    Raises:
      FileNotFoundError, ValueError: a given folder is wrong (there is no fallback then), or
        `data.source` does not make a source.
    """
    make = resolve("data source", data.source, BUILT_IN)
    if not _takes_options(make):
        raise ValueError(f"data.source={data.source!r} cannot be called with the data options")
    source = make(data)
    if not isinstance(source, Source):
        wanted = ("name", "folder", "banner", "splits", "manifest", "foils", "questions")
        lacking = ", ".join(name for name in wanted if not hasattr(source, name))
        raise ValueError(
            f"data.source={data.source!r} gives a {type(source).__name__}, which is no data "
            f"source: it lacks {lacking}"
        )
    return source


def _takes_options(make: Any) -> bool:
    """Returns whether `make` can be called with one argument, as far as its signature tells."""
    try:
        inspect.signature(make).bind(None)
    except TypeError:
        return False
    except ValueError:  # it says nothing
        return callable(make)
    return True


def find_source(data: Any) -> Source:
    """Returns the folder given, else a documented place, else the embedded world."""
    if data.dir:
        return given_folder(data)
    for place in PLACES:
        folder = Path(os.path.expanduser(place))  # a user may have no home, or none to look into
        if os.path.isdir(folder / "annotations"):
            return CocoFolder(folder, data)
    return embedded_world(data)


def given_folder(data: Any) -> Source:
    """Returns the folder `data.dir` as a source.

    Raises:
      FileNotFoundError: there is no such folder, or no captions file in it.
      ValueError: no folder is given, or it is a TFDS dataset or cannot be read.
    """
    if not data.dir:
        raise ValueError("data.source='coco' needs data.dir, a folder in COCO captions layout")
    return CocoFolder(user_path(data.dir, "data.dir"), data)


def embedded_world(data: Any) -> Source:
    """Returns the world that this package renders, made on first use and kept in the cache."""
    from unified_mm.world.build import ensure_world
    from unified_mm.world.scenes import WorldSpec

    if data.dir:
        raise ValueError(f"data.source='world' reads no folder, but data.dir={data.dir!r} is given")
    options = dict(data.world)
    spec = WorldSpec(image_size=int(data.image_size), **options)
    cache = cache_folder(data)
    with naming(f"data.cache_dir={cache}"):
        folder = ensure_world(spec, cache)
    return CocoFolder(folder, data, name="world", banner=WORLD_BANNER)


def cache_folder(data: Any) -> Path:
    """Returns `data.cache_dir`, else $UNIFIED_MM_CACHE, else the user's cache.

    Raises:
      ValueError: none is given, and the user has no home; or one names a user that there is not.
    """
    if data.cache_dir:
        return user_path(data.cache_dir, "data.cache_dir")
    if os.environ.get("UNIFIED_MM_CACHE"):
        return user_path(os.environ["UNIFIED_MM_CACHE"], "UNIFIED_MM_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return user_path(base, "XDG_CACHE_HOME") / "unified_mm"
    home = os.path.expanduser("~")
    if home == "~":
        raise ValueError(
            "this user has no home to keep caches in: name a folder that can be written, as "
            "data.cache_dir or in the environment as UNIFIED_MM_CACHE"
        )
    return Path(home) / ".cache" / "unified_mm"
