"""What a layout lists of a split: images and their texts, found on disk, not yet decoded."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unified_mm.data import clips, shapes, sounds
from unified_mm.data.images import SUFFIXES
from unified_mm.data.records import Problem, Stored, Text

# The files that layouts look for, by what they are.
MEDIA = {
    "image": SUFFIXES,
    "audio": sounds.SUFFIXES,
    "video": clips.CONTAINERS,
    "points": shapes.SUFFIXES,
}

Key = int | str


@dataclass(frozen=True)
class Entry:
    """An image that is listed, with its texts.

    Attributes:
      id: the image id.
      file: its name where it is listed; None for an example without image.
      image: the file on disk, or where it is stored; None for an example without image.
      texts: captions, and questions with answers, in order.
      parts: the files of other modalities, by the modality.
      labels: the classes that it is of.
    """

    id: Key
    file: str | None
    image: Path | Stored | None
    texts: tuple[Text, ...]
    parts: tuple[tuple[str, Path], ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """Returns the texts without a prompt."""
        return tuple(text.target for text in self.texts if not text.prompt)


@dataclass(frozen=True)
class Question:
    """A question on an image, with its answers.

    Attributes:
      answer: the most frequent of `answers`.
    """

    id: Key
    image_id: Key
    question: str
    answer: str
    answers: tuple[str, ...]
    answer_type: str
    question_type: str

    @property
    def text(self) -> Text:
        return Text(prompt=self.question, target=self.answer)


@dataclass(frozen=True)
class Foil:
    """A caption and the same caption made false in one way.

    Attributes:
      kind: what was changed.
    """

    image_id: Key
    caption: str
    foil: str
    kind: str


@dataclass(frozen=True)
class Listing:
    """The images and texts of a split.

    Attributes:
      path: the file or folder that lists them.
      entries: the images that are kept, with their texts.
      listed: the distinct image ids, those that were left out included.
      annotations: the number of texts, those that were left out included.
      directional: whether the texts name left and right throughout, so that no image may be
        flipped.
      image_problems: what is wrong with the list of images.
      caption_problems: what is wrong with the texts.
      hint: a likely cause of texts of unlisted images, for error messages; '' for none.
      looked: where image files were looked for, for error messages.
      questions: questions that are listed with the images.
      stamp: what tells whether the files that images are stored in have changed.
      media: by modality of the user's naming, which of `MEDIA` its files are.
      apart: how many more are listed at the same place, of which this is a part that was drawn.
    """

    path: Path
    entries: tuple[Entry, ...]
    listed: frozenset[Key]
    annotations: int
    directional: bool = False
    image_problems: tuple[Problem, ...] = ()
    caption_problems: tuple[Problem, ...] = ()
    hint: str = ""
    looked: str = ""
    questions: tuple[Question, ...] = ()
    stamp: str = ""
    media: Mapping[str, str] = field(default_factory=dict)
    apart: int = 0

    @property
    def problems(self) -> tuple[Problem, ...]:
        return (*self.image_problems, *self.caption_problems)


class Finder:
    """Finds image files by the names that lists give them.

    A name is looked for below each of `roots`, as it is, below those of other splits last; then by
    any file of the folder whose path ends alike, whatever the Unicode form: by the longest ending
    that just one file has, unless the name begins with a folder that is there, and not above it.

    Args:
      folder: the data folder; nothing outside of it is found.
      roots: folders in it that names are relative to, beside the folder itself.
    """

    def __init__(self, folder: Path, roots: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._roots = [root for root in dict.fromkeys((*roots, folder)) if root.is_dir()]
        self._by_split: dict[str, list[Path]] = {}

    @property
    def looked(self) -> str:
        """Says where files were looked for."""
        roots = ", ".join(f"{root}/" for root in self._roots)
        return f" (looked for them below {roots} and by the ends of their paths)"

    def find(self, name: str, split: str = "") -> Path:
        """Returns the file of a name; the first place where it should be if there is none.

        Args:
          name: as a list gives it.
          split: the list's, where it is of one.
        """
        inside = os.path.normpath(self.folder)
        plain = name.replace("\\", "/")
        for root in self._roots_of(split):
            for form in (name, plain):
                path = os.path.normpath(os.path.join(root, form))
                below = stays_below(form) or Path(path).is_relative_to(inside)
                if below and os.path.isfile(path):
                    return Path(path)
        parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
        for start in range(len(parts)):
            found = self._endings.get(_normal("/".join(parts[start:])))
            if found and not self._is_elsewhere(found, parts[:start]):
                return found
        return self._roots[0] / "/".join(parts)

    def _roots_of(self, split: str) -> list[Path]:
        """Returns the roots; two splits may have pictures of one name, each in its own folder."""
        if split not in self._by_split:
            wanted = split_named(split)
            self._by_split[split] = sorted(
                self._roots,
                key=lambda root: bool(wanted) and self._split_of(root) not in ("", wanted),
            )
        return self._by_split[split]

    def _split_of(self, root: Path) -> str:
        return "" if root == self.folder else split_named(root.name)

    def _is_elsewhere(self, found: Path, folders: Sequence[str]) -> bool:
        """Returns whether a name begins with folders that are there, and a file is not in them.

        It is another file of the same name then: of another split or class.
        """
        above = {_normal(part) for part in found.relative_to(self.folder).parts[:-1]}
        named = map(_normal, folders)
        return any(each in self._folders and each not in above for each in named)

    @cached_property
    def media(self) -> list[Path]:
        """The pictures and sounds of the folder."""
        return media_in(self.folder)

    @cached_property
    def _endings(self) -> dict[str, Path | None]:
        """Every ending of the path of every file: the file, None where two share it."""
        found: dict[str, Path | None] = {}
        for path in self.media:
            parts = path.relative_to(self.folder).parts
            for start in range(len(parts)):
                ending = _normal("/".join(parts[start:]))
                found[ending] = None if ending in found else path
        return found

    @cached_property
    def _folders(self) -> frozenset[str]:
        """The names of all folders in which there are files."""
        paths = (path.relative_to(self.folder).parts[:-1] for path in self.media)
        return frozenset(_normal(part) for parts in paths for part in parts)


def medium_of(name: str | Path) -> str:
    """Returns what a file is by its name, of `MEDIA`; 'image' where that tells nothing."""
    suffix = Path(name).suffix.lower()
    return next((medium for medium, known in MEDIA.items() if suffix in known), "image")


def names_file(value: Any) -> bool:
    """Returns whether a value is the name of a file of `MEDIA`."""
    known = frozenset[str]().union(*MEDIA.values())
    return isinstance(value, str) and Path(value).suffix.lower() in known


def media_in(folder: Path) -> list[Path]:
    """Returns the files of all `MEDIA` below a folder, as `pictures_in` does."""
    return pictures_in(folder, frozenset[str]().union(*MEDIA.values()))


def pictures_in(folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Returns the picture files below a folder, in order; hidden folders are left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (name for name in sorted(files) if Path(name).suffix.lower() in suffixes)
        found += [Path(where) / name for name in pictures if not name.startswith(".")]
    return found


def stays_below(name: str) -> bool:
    """Returns whether a name can be told at a glance to lead nowhere but below where it begins."""
    return ".." not in name and not os.path.isabs(name)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


class Row(NamedTuple):
    """What one place of a list says of an image; rows of one id are put together.

    Attributes:
      place: where it stands, for messages.
      id: the image id; None for the name of the file.
      image: the name of its file, or where it is stored; None for an example without image.
      captions: what should be texts.
      pairs: questions with answers, to learn from.
      questions: questions to be scored on too.
      parts: the names of the files of other modalities, by the modality.
      labels: the classes that it is of.
    """

    place: str
    id: Key | None
    image: str | Stored | None
    captions: Sequence[Any] = ()
    pairs: Sequence[tuple[Any, Any]] = ()
    questions: Sequence[Question] = ()
    parts: Mapping[str, str] = {}
    labels: Sequence[str] = ()


def listing_of(path: Path, rows: Iterable[Row], finder: Finder, split: str = "") -> Listing:
    """Returns the listing of rows; texts that are none are left out, counted and named.

    Args:
      path: of the file or folder that lists them.
      rows: what it lists.
      finder: finds the files that they name.
      split: of the rows.

    Raises:
      ValueError: there is no row.
    """
    images: dict[Key, str | Stored | None] = {}
    others: dict[Key, Mapping[str, str]] = {}
    labels: dict[Key, list[str]] = {}
    texts: dict[Key, list[Text]] = {}
    questions: list[Question] = []
    image_problems, text_problems = [], []
    count = 0
    for row in rows:
        named = next((str(each) for each in (row.image, *row.parts.values()) if each), row.place)
        key: Key = named if row.id is None else row.id
        same = others.setdefault(key, row.parts) == row.parts
        if images.setdefault(key, row.image) != row.image or not same:
            image_problems.append(Problem(row.place, "image id with two files", "left out"))
            continue
        known = texts.setdefault(key, [])
        classes = labels.setdefault(key, [])
        classes += [each for each in row.labels if each not in classes]
        for prompt, target in [("", each) for each in row.captions] + list(row.pairs):
            count += 1
            fault = no_text(prompt, "question") if prompt else ""
            fault = no_text(target, "answer" if prompt else "caption") or fault
            if fault:
                text_problems.append(Problem(row.place, fault, "left out"))
            else:
                known.append(Text(prompt.strip(), target.strip()))
        questions += row.questions
    if not images:
        raise ValueError(f"{path} lists no image")
    entries = []
    for each, image in images.items():
        found = finder.find(image, split) if isinstance(image, str) else image
        name = image if isinstance(image, str | None) else image.name
        parts = tuple((modality, finder.find(n, split)) for modality, n in others[each].items())
        name = name or next(iter(others[each].values()), None)
        entries.append(Entry(each, name, found, tuple(texts[each]), parts, tuple(labels[each])))
    return Listing(
        path,
        tuple(entries),
        frozenset(images),
        count,
        image_problems=tuple(image_problems),
        caption_problems=tuple(text_problems),
        looked=finder.looked,
        questions=tuple(questions),
    )


def no_text(value: Any, what: str = "caption") -> str:
    """Returns what is wrong with a text of a list, '' for a good one."""
    if not isinstance(value, str):
        return f"{what} that is no text"
    if not value.strip():
        return f"empty {what}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{what} with half of a surrogate pair"
    return ""


def id_hint(listed: Iterable[Key], used: Iterable[Key]) -> str:
    """Returns a hint that a used id and a listed id differ only in type, number or string.

    Args:
      listed: the image ids of the captions file.
      used: the image ids of annotations.

    Returns:
      The hint, to be appended to an error message; '' if all such ids agree.
    """
    numbers = {str(key): key for key in listed}
    for key in used:
        other = numbers.get(str(key), key)
        if other != key:
            return (
                f". The id {other!r} of images is written {key!r} here, a "
                f"{'string' if isinstance(key, str) else 'number'}: write ids alike"
            )
    return ""


_SPLITS = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validate", "validation", "dev", "minival"),
    "test": ("test", "testing", "testdev"),
}


def split_named(name: str) -> str:
    """Returns the split that the name of a file or folder tells: train, val, test, '' for none."""
    words = re.split(r"[^a-z]+", name.lower())
    for split, known in _SPLITS.items():
        if any(word in known for word in words):
            return split
    return ""


def files_of(entry: Entry) -> Any:
    """Returns what is equal for two entries of the same files, and for no others."""
    if isinstance(entry.image, Path) or entry.parts:
        return entry.image, entry.parts
    return entry.id


def held_out(key: Key, share: float) -> bool:
    """Returns whether an example of a folder without splits is in 'val', by its id alone.

    So more pictures change no other's side.
    """
    import zlib

    return zlib.crc32(json.dumps(key).encode()) < share * 2**32


def what_is_there(folder: Path) -> str:
    """Says what a folder holds, for messages."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"there is {', '.join(names[:10])}{more}" if names else "it is empty"


def usual(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns the first of `names` that a list has, whatever its case; '' if it has none."""
    there = {name.strip().lower(): name for name in found}
    return next((there[name] for name in names if name in there), "")
