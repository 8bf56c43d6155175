"""Sources of examples: a folder of the user's, or else the embedded world, with a notice."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

from unified_mm.data import coco
from unified_mm.data.layouts import LAYOUTS, NAMED_IN, WHOLE, Folder, Splits, nearest
from unified_mm.data.listing import (
    Foil,
    Key,
    Listing,
    Question,
    files_of,
    held_out,
    what_is_there,
)
from unified_mm.data.manifest import Sidecar, build_manifest, with_questions
from unified_mm.data.records import Manifest
from unified_mm.files import naming, uncollected, user_cache, user_path
from unified_mm.registry import resolve

BUILT_IN = {
    "auto": "unified_mm.data.sources:find_source",
    **dict.fromkeys(LAYOUTS, "unified_mm.data.sources:given_folder"),
    "mixture": "unified_mm.data.mixture:open_mixture",
    "solids": "unified_mm.data.sources:find_solids",
    "sounds": "unified_mm.data.sources:find_sounds",
    "speech": "unified_mm.data.sources:find_speech",
    "clips": "unified_mm.data.sources:find_clips",
    "tfds": "unified_mm.data.tfds_source:open_dataset",
    "world": "unified_mm.data.sources:embedded_world",
}
# Where a COCO folder is looked for when none is given.
PLACES = ("data/coco", "data/coco2017", "~/data/coco", "~/datasets/coco")

# Shown wherever data that this package makes is used.
BANNER = (
    "NO DATA DIRECTORY WAS GIVEN, so this run uses {}. Its scores say nothing about {}. For your "
    "own data: --config.data.dir=FOLDER (README has the layouts)."
)


@runtime_checkable
class Source(Protocol):
    """A named origin of examples, split by split.

    It may have `foils(split)` and `questions(split)` too, and a text `described`: what it took its
    folder for.

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


def foils_of(source: Source, split: str) -> Sequence[Foil]:
    """Returns captions made false by one word, of a source that has them (`foils(split)`)."""
    return _of(source, "foils", split)


def questions_of(source: Source, split: str) -> Sequence[Question]:
    """Returns questions with answers, of a source that has them (`questions(split)`)."""
    return _of(source, "questions", split)


def _of(source: Source, what: str, split: str) -> Sequence[Any]:
    found: Sequence[Any] = getattr(source, what)(split) if hasattr(source, what) else ()
    return found


class AnnotatedFolder:
    """Examples with captions, and in `annotations/` files of questions and foils on them.

    Subclasses read the captions.

    Attributes:
      media: what the files of modalities are whose names do not tell it, such as 'audio'.
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
        self.media: Mapping[str, str] = {}
        self._questions: dict[str, Sequence[Question]] = {}  # those that were read
        # By split, and by whether questions are checked: reading 20,000 examples takes a second.
        self._manifests: dict[tuple[str, bool], Manifest] = {}
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
        checked = split, split in self._questions
        if checked not in self._manifests:
            questions = self._questions.get(split, ())
            manifest = self._build(split, self._beside_all(split, questions))
            self._manifests[checked] = (
                with_questions(manifest, questions) if self._asking else manifest
            )
        return self._manifests[checked]

    def captioned(self, split: str) -> Manifest:
        """Returns the validated examples of a split with captions alone.

        Foils and questions are checked too.
        """
        return self._build(split, self._beside_all(split, self.questions(split)))

    def _build(self, split: str, sidecars: Sequence[Sidecar]) -> Manifest:
        raise NotImplementedError

    def foils(self, split: str) -> Sequence[Foil]:
        return coco.read_foils(self.folder, split) if coco.has_foils(self.folder, split) else ()

    def questions(self, split: str) -> Sequence[Question]:
        if split not in self._splits or not coco.has_questions(self.folder, split):
            return ()
        if split not in self._questions:
            with uncollected():
                self._questions[split] = coco.read_questions(self.folder, split)
        return self._questions[split]

    def no_questions(self, split: str) -> str:
        """Returns an error message: the split has no questions, and what was looked for."""
        return coco.no_questions(self.folder, split)

    def _beside_all(self, split: str, questions: Sequence[Question]) -> tuple[Sidecar, ...]:
        return (
            self._beside("foil", self.foils(split), self._max_orphans),
            self._beside("question", questions, self._share_of_questions(split)),
        )

    def _beside(
        self, what: str, members: Sequence[Foil] | Sequence[Question], share: float
    ) -> Sidecar:
        return Sidecar(what, [member.image_id for member in members], share)

    def _share_of_questions(self, split: str) -> float:
        """Returns the share of questions allowed on unlisted images: 1 for VQA v2's own files."""
        return 1.0 if coco.questions_serve_others(self.folder, split) else self._max_orphans


class ListedFolder(AnnotatedFolder):
    """A folder in one of the layouts of `data.layouts`.

    Attributes:
      described: what the folder was taken for, and where its splits come from.
    """

    def __init__(
        self,
        folder: Path,
        splits: Splits,
        data: Any,
        *,
        name: str,
        described: str = "",
        banner: str | None = None,
    ) -> None:
        self.described = described
        self._listed = dict(splits)
        self._known: dict[str, Listing] = {}
        if set(splits) == {WHOLE} or (name != "coco" and {"train", "val"} - set(splits) == {"val"}):
            self._hold_out("train" if "train" in splits else WHOLE, float(data.val_share))
        if WHOLE in self._listed and data.train_split != WHOLE:
            self.described += f"; what tells no split is {WHOLE!r}, which is not trained on"
        self._check_at_most, self._train_split = int(data.check_at_most), data.train_split
        super().__init__(folder, list(self._listed), data, name=name, banner=banner)
        self.media = {
            name.strip(): medium
            for medium in ("audio", "points", "video")
            for name in data.fields[medium].split(",")
        }

    def _hold_out(self, whole: str, share: float) -> None:
        """Makes 'train' and 'val' of one split, by the examples' ids alone.

        Examples of the same files go where the first of them does.
        """
        if not 0 < share < 1:
            raise ValueError(f"data.val_share={share}: must be between 0 and 1")
        listed = self._listed.pop(whole)

        def part(val: bool) -> Listing:
            found = self._known.setdefault(whole, listed()) if whole == WHOLE else listed()
            first: dict[Any, Key] = {}
            for entry in found.entries:
                first.setdefault(files_of(entry), entry.id)
            kept = tuple(e for e in found.entries if held_out(first[files_of(e)], share) == val)
            if not kept:
                raise ValueError(
                    f"{found.path} lists {len(found.entries)} example(s), and none of them falls "
                    f"into {'val' if val else 'train'} by data.val_share={share}: change it"
                )
            ids = {entry.id for entry in kept}
            asked = tuple(each for each in found.questions if each.image_id in ids)
            others = len(found.entries) - len(kept)
            return replace(
                found, entries=kept, listed=frozenset(ids), questions=asked, apart=others
            )

        self._listed |= {"train": partial(part, False), "val": partial(part, True)}
        self.described += f"; 'val' is {share:.0%} of it, by name (data.val_share)"

    def _listing(self, split: str) -> Listing:
        if split not in self._listed:
            raise ValueError(
                f"{self.folder} has no split {split!r}: it has {', '.join(self._listed)}"
            )
        if split not in self._known:
            with uncollected():
                self._known[split] = replace(self._listed[split](), media=self.media)
        return self._known[split]

    def manifest(self, split: str) -> Manifest:
        """Returns the validated examples of a split; questions are texts where nothing else is."""
        found = super().manifest(split)
        listing = self._listing(split)
        if listing.questions and not self._asking and not listing.annotations:
            return with_questions(found, listing.questions)
        return found

    def questions(self, split: str) -> Sequence[Question]:
        if split in self._listed and (found := self._listing(split).questions):
            return found
        return super().questions(split)

    def _build(self, split: str, sidecars: Sequence[Sidecar]) -> Manifest:
        return build_manifest(
            self._listing(split),
            self.folder,
            split,
            source=self.name,
            cache=self._cache,
            max_bad_share=self._max_bad_share,
            sidecars=sidecars,
            check_at_most=self._check_at_most if split == self._train_split else 0,
        )


def coco_folder(
    folder: Path, data: Any, *, name: str = "coco", banner: str | None = None
) -> ListedFolder:
    """Returns a folder in the layout of MS-COCO captions as a source."""
    splits = {
        split: partial(coco.read_captions, folder, split) for split in coco.find_splits(folder)
    }
    return ListedFolder(folder, splits, data, name=name, banner=banner)


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
        wanted = ("name", "folder", "banner", "splits", "manifest")
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
            return coco_folder(folder, data)
    return embedded_world(data)


def given_folder(data: Any) -> Source:
    """Returns the folder `data.dir` as a source, by its layout or by the one in `data.source`.

    Raises:
      FileNotFoundError: there is no such folder, or it is laid out in no known way.
      ValueError: no folder is given, or it cannot be read.
    """
    if not data.dir:
        raise ValueError(f"data.source={data.source!r} needs data.dir, the folder of the data")
    path = user_path(data.dir, "data.dir")
    if not os.path.isdir(path):
        fault = "is a file" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(
            f"the data folder {path} {fault}: set data.dir to a folder with images and their texts"
        )
    if data.source == "auto" and (path / "dataset_info.json").is_file():
        found: Source = resolve("data source", "tfds", BUILT_IN)(data)
        return found
    named = data.fields
    folder = Folder(
        path,
        named.image,
        named.caption,
        cache_folder(data),
        named.audio,
        named.points,
        named.label,
        data.val_rows,
        named.video,
    )
    with naming(f"data.dir={path}"):
        if data.source != "auto":
            what, splits_of = LAYOUTS[data.source]
            if not (splits := splits_of(folder)):
                raise FileNotFoundError(_not_found(folder, f"it is not laid out as {what}"))
            refuse_unused(data, data.source)
            return ListedFolder(
                path, splits, data, name=data.source, described=f"data: {path} is read as {what}"
            )
        laid_out = {name: splits for name, (_, of) in LAYOUTS.items() if (splits := of(folder))}
    if not laid_out:
        raise FileNotFoundError(_not_found(folder, "none of the known layouts"))
    (name, splits), *others = laid_out.items()
    refuse_unused(data, name)
    described = f"data: {path} is read as {LAYOUTS[name][0]}"
    if others:
        also = ", ".join(f"data.source={other}" for other, _ in others)
        described += f"; what could be read too: {also}"
    return ListedFolder(path, splits, data, name=name, described=described)


def refuse_unused(data: Any, layout: str) -> None:
    """Raises ValueError where fields or rows are named for a layout that has none."""
    for name, readers in NAMED_IN.items():
        if (given := data.fields[name]) and layout not in readers:
            raise ValueError(
                f"data.fields.{name}={given!r} is for data.source={' or '.join(readers)}, and "
                f"{data.dir} is read as {LAYOUTS[layout][0]}: leave it out, or choose another "
                "data.source"
            )
    if data.val_rows and layout not in ("table", "imagefolder"):
        raise ValueError(
            f"data.val_rows={data.val_rows!r} is for the rows of tables and JSON lines, and "
            f"{data.dir} is read as {LAYOUTS[layout][0]}: make 'val' a folder or a list of its "
            "own, or leave it to data.val_share"
        )


def _not_found(folder: Folder, fault: str) -> str:
    """Returns the error message of a folder that cannot be read, with the nearest layout."""
    known = "; ".join(f"{name}: {what}" for name, (what, _) in LAYOUTS.items())
    return (
        f"{folder.path}: {fault}; {what_is_there(folder.path)}. {nearest(folder)}"
        f"What is read (data.source): {known}"
    )


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
    made = "the embedded world: small rendered scenes of spheres, cubes and cylinders with "
    banner = BANNER.format(f"{made}generated captions", "photographs")
    return coco_folder(folder, data, name="world", banner=banner)


def find_sounds(data: Any) -> Source:
    """Returns the folder given, else sounds that this package makes, kept in the cache."""
    from unified_mm.world.tones import ensure_tones

    made = "sounds that are made: tones, sweeps, clicks and noises"
    return _given_or_made(data, ensure_tones, "classes", "tones", made, "sounds of the world")


def find_speech(data: Any) -> Source:
    """Returns the folder given, else strings of digits as tones, kept in the cache."""
    from unified_mm.world.tones import ensure_strings

    made = "strings of digits that are made of telephone tones"
    return _given_or_made(data, ensure_strings, "table", "strings", made, "speech")


def find_solids(data: Any) -> Source:
    """Returns the folder given, else shapes that this package makes, kept in the cache."""
    from unified_mm.world.solids import ensure_solids

    made = "shapes that are made: boxes, balls and other solids"
    return _given_or_made(data, ensure_solids, "shapes", "solids", made, "things of the world")


def find_clips(data: Any) -> Source:
    """Returns the folder given, else clips that this package draws, kept in the cache."""
    from unified_mm.world.drawn import ensure_clips

    made = "clips that are drawn: two solids that move, and hit or pass"
    return _given_or_made(data, ensure_clips, "coco", "clips", made, "videos of the world")


def _given_or_made(
    data: Any, make: Callable[[Path], Path], layout: str, name: str, made: str, unlike: str
) -> Source:
    if data.dir:
        return given_folder(data.changed({"source": "auto"}))
    cache = cache_folder(data)
    with naming(f"data.cache_dir={cache}"):
        folder = make(cache)
    splits = LAYOUTS[layout][1](Folder(folder))
    return ListedFolder(folder, splits, data, name=name, banner=BANNER.format(made, unlike))


def cache_folder(data: Any) -> Path:
    """Returns `data.cache_dir`, else the user's cache.

    Raises:
      ValueError: as `user_cache` does.
    """
    if data.cache_dir:
        return user_path(data.cache_dir, "data.cache_dir")
    return user_cache()
