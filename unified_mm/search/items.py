"""Files that each hold an item of a modality: found below a folder or in a COCO set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unified_mm.data import coco
from unified_mm.data.images import SUFFIXES
from unified_mm.data.records import Problem
from unified_mm.inference.loaded import LoadedModel

Stat = tuple[int, int]  # a file's size in bytes and time of change in nanoseconds


@dataclass(frozen=True)
class ItemSet:
    """Files of one folder in a fixed order, nothing decoded yet.

    Attributes:
      of: the items' modality.
      folder: absolute.
      splits: of a COCO set; () for a folder that is none.
      names: of the files, within the folder.
      captions: of each item; all empty where the folder is no COCO set.
      stats: of each file, None where there is none.
      ids: of each item: that of the COCO set, else the name.
      problems: of the annotations.
    """

    of: str
    folder: Path
    splits: tuple[str, ...]
    names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    stats: tuple[Stat | None, ...]
    ids: tuple[int | str, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def noun(self) -> str:
        """What several of the items are called to a user."""
        return noun(self.of)

    def fingerprint(self) -> str:
        """Returns the SHA-256 over names, sizes, times of change and captions."""
        digest = hashlib.sha256()
        for item in zip(self.names, self.stats, self.captions, strict=True):
            digest.update(json.dumps(item).encode())
        return digest.hexdigest()


def read_items(
    folder: str | os.PathLike[str],
    splits: Sequence[str] = (),
    *,
    of: str = "image",
    suffixes: Collection[str] = SUFFIXES,
) -> ItemSet:
    """Returns the pictures of a COCO set (`unified_mm.data.coco`), else all items below a folder.

    Args:
      folder: a COCO set where it holds annotations/captions_*.json and images are asked for.
      splits: of a COCO set; () for all.
      of: the items' modality.
      suffixes: of their files.

    Raises:
      FileNotFoundError: no such folder, or no item in it.
      ValueError: splits of a folder that is no COCO set or lacks them, or malformed annotations.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one with {noun(of)}, or a COCO set")
    if of == "image" and any((folder / "annotations").glob("captions_*.json")):
        return _coco_set(folder, splits or tuple(coco.find_splits(folder)))
    if splits:
        raise ValueError(
            f"{folder} has no splits to choose from: it is no COCO set of pictures (it has no "
            "annotations/captions_*.json)"
        )
    files = [file for file in files_below(folder) if is_item(file, suffixes)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no {of} ({', '.join(sorted(suffixes))})")
    names = tuple(os.path.relpath(file, folder) for file in files)
    return ItemSet(of, folder, (), names, ((),) * len(names), tuple(map(file_stat, files)), names)


def _coco_set(folder: Path, splits: Sequence[str]) -> ItemSet:
    found = [coco.read_captions(folder, split) for split in splits]
    pictures = [
        (entry.image, entry.captions, entry.id)
        for each in found
        for entry in each.entries
        if isinstance(entry.image, Path)
    ]
    if not pictures:
        raise FileNotFoundError(f"{folder}: no example of {', '.join(splits)} has an image")
    files, captions, ids = zip(*pictures, strict=True)
    names = tuple(os.path.relpath(file, folder) for file in files)
    stats = tuple(file_stat(folder / name) for name in names)
    problems = tuple(problem for each in found for problem in each.problems)
    return ItemSet("image", folder, tuple(splits), names, captions, stats, ids, problems)


def noun(of: str) -> str:
    """Returns what several items of a modality are called to a user."""
    return "pictures" if of == "image" else f"{of} items"


def file_stat(file: Path) -> Stat | None:
    """Returns a file's size and time of change; None for no file."""
    if not os.path.isfile(file):
        return None
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def files_below(directory: Path) -> Iterator[Path]:
    """Yields every file below a directory, by name, without hidden ones.

    Links to directories are not followed.

    Raises:
      OSError: a directory that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def is_item(file: Path, suffixes: Collection[str] = SUFFIXES) -> bool:
    """Returns whether a file is taken for an item of a modality, by its suffix."""
    return file.suffix.lower() in suffixes


def shown(path: str | Path) -> str:
    """Returns a path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def refuse_without_contrast(model: LoadedModel, what: str, noun: str, of: str = "image") -> None:
    """Checks that the model embeds items of a modality and texts in one space.

    Args:
      model: the loaded model.
      what: what it is wanted for, as a verb in the message.
      noun: the same as a noun.
      of: the modality.

    Raises:
      ValueError: it does not.
    """
    if not model.predictor.can_retrieve(of):
        trained = ", ".join(objective.name for objective in model.task.objectives)
        raise ValueError(
            f"this run cannot {what}: it was trained on {trained}, and {noun} needs contrast "
            f"between {of} and text"
        )
