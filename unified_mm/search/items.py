"""Picture files for a model: found below a folder or in a COCO set, with faults reported."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import UInt8
from numpy import ndarray

from unified_mm.data import coco
from unified_mm.data.images import ImageError
from unified_mm.data.records import Problem
from unified_mm.inference.loaded import LoadedModel

# What is taken for a picture by its name.
SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()
)


@dataclass(frozen=True)
class PictureSet:
    """Picture files of one folder in a fixed order, nothing decoded yet.

    Attributes:
      folder: absolute.
      splits: of a COCO set; () for a folder that is none.
      names: of the files, within the folder.
      captions: of each picture; all empty where the folder is no COCO set.
      stats: each file's size in bytes and time of change in nanoseconds, None for no file.
      problems: of the annotations.
    """

    folder: Path
    splits: tuple[str, ...]
    names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    stats: tuple[tuple[int, int] | None, ...]
    problems: tuple[Problem, ...]

    def fingerprint(self) -> str:
        """Returns the SHA-256 over names, sizes, times of change and captions."""
        digest = hashlib.sha256()
        for picture in zip(self.names, self.stats, self.captions, strict=True):
            digest.update(json.dumps(picture).encode())
        return digest.hexdigest()


def read_picture_set(folder: str | os.PathLike[str], splits: Sequence[str] = ()) -> PictureSet:
    """Returns the pictures of a COCO set (`unified_mm.data.coco`), else all below a folder.

    Args:
      folder: a COCO set where it holds annotations/captions_*.json.
      splits: of a COCO set; () for all.

    Raises:
      FileNotFoundError: no such folder, or no picture in it.
      ValueError: splits of a folder that is no COCO set or lacks them, or malformed annotations.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one with pictures, or a COCO set")
    if any((folder / "annotations").glob("captions_*.json")):
        return _coco_set(folder, splits or tuple(coco.find_splits(folder)))
    if splits:
        raise ValueError(
            f"{folder} has no splits to choose from: it is no COCO set (it has no "
            "annotations/captions_*.json)"
        )
    names = [os.path.relpath(file, folder) for file in files_below(folder) if is_picture(file)]
    if not names:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return _with_stats(folder, (), [(name, ()) for name in names], ())


def _coco_set(folder: Path, splits: Sequence[str]) -> PictureSet:
    pictures: list[tuple[str, tuple[str, ...]]] = []
    problems: list[Problem] = []
    for split in splits:
        found = coco.read_captions(folder, split)
        problems += found.problems
        pictures += [
            (os.path.relpath(entry.path, folder), entry.captions)
            for entry in found.entries
            if entry.path is not None
        ]
    if not pictures:
        raise FileNotFoundError(f"{folder}: no example of {', '.join(splits)} has an image")
    return _with_stats(folder, tuple(splits), pictures, tuple(problems))


def _with_stats(
    folder: Path,
    splits: tuple[str, ...],
    pictures: Sequence[tuple[str, tuple[str, ...]]],
    problems: tuple[Problem, ...],
) -> PictureSet:
    names, captions = zip(*pictures, strict=True)
    stats = tuple(file_stat(folder / name) for name in names)
    return PictureSet(folder, splits, names, captions, stats, problems)


def file_stat(file: Path) -> tuple[int, int] | None:
    """Returns a file's size in bytes and time of change in nanoseconds; None for no file."""
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


def is_picture(file: Path) -> bool:
    """Returns whether a file is taken for a picture, by its suffix."""
    return file.suffix.lower() in SUFFIXES


def shown(path: str | Path) -> str:
    """Returns a path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def view_or_fault(model: LoadedModel, file: Path) -> UInt8[ndarray, "size size 3"] | str:
    """Returns what the model sees of a file, or a text that says what is wrong with it."""
    try:
        return model.view(file)
    except ImageError as error:
        return error.what
    except OSError as error:
        return f"unreadable: {error.strerror or 'no file'}"


def refuse_without_contrast(model: LoadedModel, what: str, noun: str) -> None:
    """Checks that the model embeds images and texts in one space.

    Args:
      what: what it is wanted for, as a verb in the message.
      noun: the same as a noun.

    Raises:
      ValueError: it does not.
    """
    if not model.predictor.can_retrieve():
        trained = ", ".join(objective.name for objective in model.task.objectives)
        raise ValueError(
            f"this run cannot {what}: it was trained on {trained}, and {noun} needs contrast "
            "between image and text"
        )
