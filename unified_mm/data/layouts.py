"""How people lay out files with texts: a function a layout, each giving the splits of a folder.

A layout's function takes a `Folder` and returns how to list each split, by name, or nothing where
the folder is laid out otherwise. A folder without splits of its own has the one split `WHOLE`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from unified_mm.data import coco, shards
from unified_mm.data.images import SUFFIXES
from unified_mm.data.listing import (
    MEDIA,
    Finder,
    Key,
    Listing,
    Question,
    Row,
    listing_of,
    media_in,
    medium_of,
    names_file,
    pictures_in,
    split_named,
    usual,
)
from unified_mm.data.records import Problem, Stored
from unified_mm.files import naming, read_json

WHOLE = "all"  # the only split of a folder that has none of its own
# What columns and keys are called, in lists that people have; the first that is there is read.
IMAGE_NAMES = (
    "filepath", "file_name", "filename", "image", "image_path", "image_name", "path", "file", "img",
)  # fmt: skip
CAPTION_NAMES = (
    "title", "caption", "captions", "text", "raw", "comment", "description",
    "transcript", "transcription", "sentence",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "category", "class", "class_name", "tags")
PART_NAMES = {
    "audio": ("audio", "audio_path", "audio_file", "sound", "wav", "clip"),
    "points": ("points", "point_cloud", "cloud", "mesh"),
    "video": ("video", "video_path", "video_file", "video_name"),
}
ID_NAMES = ("image_id", "img_id", "imgid", "cocoid", "id")

Splits = Mapping[str, Callable[[], Listing]]


@dataclass(frozen=True)
class Folder:
    """A data folder, with what its layout may need to know.

    Attributes:
      path: the folder.
      image, caption: what the user calls the fields of images and captions; '' for usual names.
      cache: where what is costly to find out is kept.
      audio, points, video: what the fields of sounds, shapes and videos are called; of several,
        with commas, each is the modality of its name.
      label: what the field of classes is called.
      val_rows: `FIELD=VALUE,VALUE`: the rows of lists that are 'val', all others being 'train'; ''
        for none.
    """

    path: Path
    image: str = ""
    caption: str = ""
    cache: Path | None = None
    audio: str = ""
    points: str = ""
    label: str = ""
    val_rows: str = ""
    video: str = ""

    @cached_property
    def files(self) -> list[Path]:
        """The files of the folder and of those in it, pictures apart, in order."""
        found = [*self.path.glob("*"), *self.path.glob("*/*")]
        return sorted(p for p in found if p.is_file() and not _is_medium(p))

    @cached_property
    def json_lists(self) -> list[tuple[Path, Any]]:
        """The JSON files of the folder, with what they hold."""
        return [(file, read_json(file)) for file in self.files if file.suffix == ".json"]

    @cached_property
    def finder(self) -> Finder:
        roots = [self.path / "images", *(p for p in sorted(self.path.glob("*")) if p.is_dir())]
        return Finder(self.path, roots)

    def near(self, file: Path, name: str) -> str:
        """Returns the name within the folder of an image that is named beside `file`, if it is."""
        beside = file.parent / name.replace("\\", "/")
        if not os.path.isfile(beside):
            return name
        if beside.is_relative_to(self.path):
            return beside.relative_to(self.path).as_posix()
        # A name from the root of a folder that is given by a relative path or by a link.
        found, inside = Path(os.path.realpath(beside)), os.path.realpath(self.path)
        return found.relative_to(inside).as_posix() if found.is_relative_to(inside) else name

    def image_name(self, fields: Mapping[str, Any]) -> str:
        return _called(self.image, fields, IMAGE_NAMES)

    def caption_name(self, fields: Mapping[str, Any]) -> str:
        return _called(self.caption, fields, CAPTION_NAMES)

    def label_name(self, fields: Mapping[str, Any]) -> str:
        return _called(self.label, fields, LABEL_NAMES)

    def is_meant(self, fields: Mapping[str, Any]) -> bool:
        """Returns whether a list has all the fields that the user names."""
        return {self.image, self.caption, self.label} - {""} <= set(fields)

    @property
    def given_parts(self) -> tuple[tuple[str, str], ...]:
        return ("audio", self.audio), ("points", self.points), ("video", self.video)

    def part_names(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """Returns the fields of what is neither picture nor text, by the modality that reads it."""
        found: dict[str, str] = {}
        for medium, given in self.given_parts:
            names = [name.strip() for name in given.split(",")] if given else []
            names = names or [usual(fields, PART_NAMES[medium])]
            alone = len(names) == 1
            found |= {medium if alone else name: name for name in names if name in fields}
        return found

    def names_media(self, fields: Mapping[str, Any]) -> bool:
        """Returns whether a row has the field of a picture, a sound, a shape or a video."""
        return bool(self.image_name(fields) or self.part_names(fields))

    def row(self, file: Path, place: str, key: Key | None, fields: Mapping[str, Any]) -> Row:
        """Returns the row of a list that names files, with captions or classes.

        What has classes and no caption is called by them.
        """
        image = self._file_name(file, place, fields, self.image_name(fields))
        parts = {
            name: found
            for name, field in self.part_names(fields).items()
            if self._is_meant(name, fields.get(field))
            and (found := self._file_name(file, place, fields, field))
        }
        # What the usual field names, a file or a clip, is what its suffix says.
        if not self.audio and medium_of(parts.get("audio", "")) == "video":
            parts = {"video": parts.pop("audio"), **parts}
        if image and (medium := medium_of(image)) != "image" and not self.image:
            parts, image = {medium: image, **parts}, None
        labels: list[Any] = []
        if parts or self.label:
            labels = _several(fields.get(self.label_name(fields)), ";")
        labels = [str(each) for each in labels if each not in (None, "")]
        field = self.caption_name(fields)
        captions = _captions_of(fields.get(field)) if field or not labels else None
        if captions is None:
            captions = [in_words(each) for each in labels]
        return Row(place, key, image, captions, parts=parts, labels=labels)

    def _is_meant(self, name: str, value: Any) -> bool:
        """Returns whether a field of a usual name holds a file: `points` may be a count."""
        told = name == "audio" or any(name in given.split(",") for _, given in self.given_parts)
        return told or names_file(value)

    def _file_name(
        self, file: Path, place: str, fields: Mapping[str, Any], field: str
    ) -> str | None:
        name = fields.get(field) or None
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{file}: {place}: {json.dumps(name):.40} is no name of an image")
        return name and self.near(file, name)

    def split_of(self, file: Path, place: str, fields: Mapping[str, Any]) -> str:
        """Returns the split that a row says it is of; '' where it says nothing.

        Raises:
          ValueError: the row lacks the field of `val_rows`.
        """
        if not self.val_rows:
            split = fields.get("split") or ""
            return split_named(split) or str(split)
        field, _, values = self.val_rows.partition("=")
        if field not in fields or not values:
            raise ValueError(
                f"{file}: {place}: data.val_rows={self.val_rows!r} must be FIELD=VALUE,VALUE with "
                f"a field of it: {', '.join(fields)}"
            )
        return "val" if str(fields[field]) in values.split(",") else "train"


def _called(given: str, fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns the field that the user names, else one of the usual names; '' if it is not there."""
    if not given:
        return usual(fields, names)
    return given if given in fields else ""


def _is_medium(file: Path) -> bool:
    return any(file.suffix.lower() in known for known in MEDIA.values())


def in_words(name: str) -> str:
    """Returns the name of a class or of its folder in words."""
    return re.sub(r"[_\s]+", " ", name)


def _grouped(
    files: Iterable[Path], folder: Folder, folders: int = 1, classes: Collection[str] = ()
) -> dict[str, list[Path]]:
    """Returns files by the split that their names tell, or the first `folders` they are in.

    Args:
      files: in the folder.
      folder: the data folder.
      folders: that may tell it.
      classes: names of folders that tell none.
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        *above, _ = file.relative_to(folder.path).parts
        # A picture may be called train_station.jpg: its folder alone tells its split.
        names = (name for name in above[:folders] if name.isalpha() and name not in classes)
        said = (split_named(name) for name in names)
        told = next(filter(None, said), "")
        if not told and not _is_medium(file):
            told = split_named(file.name)
        found.setdefault(told or WHOLE, []).append(file)
    return found


def _by_split(
    files: Iterable[Path],
    read: Callable[[Path], Iterable[Row]],
    folder: Folder,
    folders: int = 1,
    classes: Collection[str] = (),
) -> Splits:
    """Returns the splits of files; what files of one split list is put together."""

    def listed(split: str, these: Sequence[Path]) -> Listing:
        rows = (row for file in these for row in read(file))
        return listing_of(these[0], rows, folder.finder, split)

    grouped = _grouped(files, folder, folders, classes)
    return {split: partial(listed, split, these) for split, these in grouped.items()}


def coco_captions(folder: Folder) -> Splits:
    """Reads MS-COCO's `annotations/captions_*.json`."""
    if not any((folder.path / "annotations").glob("captions_*.json")):
        return {}
    names = coco.find_splits(folder.path)
    return {name: partial(coco.read_captions, folder.path, name) for name in names}


def karpathy(folder: Folder) -> Splits:
    """Reads Karpathy's `dataset_coco.json`: images with `sentences` and their `split`."""
    for file, data in folder.json_lists:
        images = data.get("images") if isinstance(data, dict) else None
        if isinstance(images, list) and images and "sentences" in _first(images):
            return _karpathy_splits(folder, file, images)
    return {}


def _karpathy_splits(folder: Folder, file: Path, images: list) -> Splits:
    rows: dict[str, list[Row]] = {}
    for number, image in enumerate(images):
        place = f"{file.name}: images[{number}]"
        names = [_string(image, key, place) for key in ("filepath", "filename") if image.get(key)]
        captions = [each.get("raw") for each in image["sentences"]]
        key = next((image[name] for name in ("cocoid", "imgid") if name in image), None)
        split = split_named(_string(image, "split", place)) or image["split"]
        rows.setdefault(split, []).append(Row(place, key, "/".join(names), captions))
    return {
        split: partial(listing_of, file, members, folder.finder, split)
        for split, members in rows.items()
    }


def msrvtt(folder: Folder) -> Splits:
    """Reads MSR-VTT's `videos` with `split`, and `sentences` with the `video_id` of each."""
    videos = {path.stem: path for path in media_in(folder.path) if medium_of(path) == "video"}
    found: dict[str, tuple[Path, list[Row]]] = {}
    lost: list[Problem] = []
    for file, data in folder.json_lists:
        if not (isinstance(data, dict) and {"videos", "sentences"} <= set(data)):
            continue
        captions: dict[Any, list[Any]] = {}
        listed = {each.get("video_id") for each in data["videos"]}
        for number, each in enumerate(data["sentences"]):
            place = f"{file.name}: sentences[{number}]"
            key = _string(each, "video_id", place)
            captions.setdefault(key, []).append(each.get("caption"))
            if key not in listed:
                lost.append(Problem(place, "caption of an unlisted video", "left out"))
        for number, each in enumerate(data["videos"]):
            place = f"{file.name}: videos[{number}]"
            key = _string(each, "video_id", place)
            video = videos.get(key)
            name = video.relative_to(folder.path).as_posix() if video else f"{key}.mp4"
            split = str(each.get("split") or "")
            _, rows = found.setdefault(split_named(split) or split or WHOLE, (file, []))
            rows.append(Row(place, key, None, captions.get(key, []), parts={"video": name}))

    def read(split: str, file: Path, rows: Sequence[Row]) -> Listing:
        of_split = listing_of(file, rows, folder.finder, split)
        if split != next(iter(found)):  # they are of no split, and told once
            return of_split
        problems, count = (*of_split.caption_problems, *lost), of_split.annotations + len(lost)
        return replace(of_split, caption_problems=problems, annotations=count)

    return {split: partial(read, split, *each) for split, each in found.items()}


def lavis(folder: Folder) -> Splits:
    """Reads JSON lists of `image` and `caption`, as LAVIS has them."""
    files = {
        file: data
        for file, data in folder.json_lists
        if isinstance(data, list) and data
        and folder.names_media(_first(data)) and folder.caption_name(_first(data))
        and folder.is_meant(_first(data))
    }  # fmt: skip

    def rows(file: Path) -> Iterator[Row]:
        for number, each in enumerate(files[file]):
            yield _object_row(folder, file, f"{file.name}[{number}]", each)

    return _by_split(files, rows, folder)


def _object_row(folder: Folder, file: Path, place: str, fields: Any) -> Row:
    """Returns the row of an object that names an image and one caption or several."""
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: {place} must be an object, is {json.dumps(fields):.40}")
    return folder.row(file, place, _key(fields), fields)


def _key(fields: Mapping[str, Any]) -> Key | None:
    name = usual(fields, ID_NAMES)
    key = fields.get(name)
    return key if isinstance(key, int | str) and not isinstance(key, bool) and key != "" else None


def llava(folder: Folder) -> Splits:
    """Reads LLaVA's conversations: what a person asks is a prompt, what is answered the target."""
    files = {
        file: data
        for file, data in folder.json_lists
        if isinstance(data, list) and data and "conversations" in _first(data)
    }

    def rows(file: Path) -> Iterator[Row]:
        for number, each in enumerate(files[file]):
            place = f"{file.name}[{number}]"
            said = each.get("conversations") or []
            pairs = []
            unanswered = {"from": "gpt", "value": ""}  # the last turn, where it is a person's
            for asked, answered in zip_longest(said[::2], said[1::2], fillvalue=unanswered):
                if asked.get("from") != "human" or answered.get("from") != "gpt":
                    raise ValueError(f"{place}: human and gpt must take turns")
                prompt = str(asked.get("value", "")).replace("<image>", "").strip()
                pairs.append((prompt, answered.get("value")))
            yield Row(place, None, each.get("image") or None, pairs=pairs)

    return _by_split(files, rows, folder)


@dataclass(frozen=True)
class Asked:
    """What the fields of a file of questions are called; a name may have '{}', the question's id.

    Attributes:
      image: the image's file or id.
      answers: a list of texts or of objects with `answer`, or one text.
    """

    image: str
    answers: str
    question: str = "question"


# VizWiz; TextVQA; GQA; OK-VQA and VQA v2 with their answers put in.
ASKED = (
    Asked("image", "answers"),
    Asked("image_id", "answers"),
    Asked("imageId", "answer"),
    Asked("image", "answer"),
)


def questions(folder: Folder) -> Splits:
    """Reads files of questions: OK-VQA, VizWiz, TextVQA, GQA, by a table of the fields' names."""
    answers = _answers(folder)
    files = {}
    for file, data in folder.json_lists:
        asked = _asked(data)
        if asked and _fields_of(asked[0][1], bool(answers)):
            files[file] = asked

    def rows(file: Path) -> Iterator[Row]:
        for key, each in files[file]:
            yield _question_row(folder, f"{file.name}: question {key!r}", key, each, answers)

    return _by_split(files, rows, folder)


def _asked(data: Any) -> list[tuple[Key, dict]]:
    """Returns the questions of a file by id: of a list, of `data` or `questions`, or by key."""
    if isinstance(data, dict):
        for name in ("data", "questions"):
            if isinstance(data.get(name), list):
                return _asked(data[name])
        if data and all(isinstance(each, dict) and "question" in each for each in data.values()):
            return list(data.items())
        return []
    if not isinstance(data, list) or not data or "question" not in _first(data):
        return []
    return [(each.get("question_id", number), each) for number, each in enumerate(data)]


def _answers(folder: Folder) -> dict[Key, dict]:
    """Returns the answers that lie in files of their own, as VQA's do, by question."""
    found: dict[Key, dict] = {}
    for _, data in folder.json_lists:
        members = data.get("annotations") if isinstance(data, dict) else None
        if isinstance(members, list) and members and "answers" in _first(members):
            found |= {each["question_id"]: each for each in members}
    return found


def _fields_of(question: Mapping[str, Any], answered: bool) -> Asked | None:
    fits = (f for f in ASKED if f.image in question and (f.answers in question or answered))
    return next(fits, None)


def _question_row(
    folder: Folder, place: str, key: Key, each: dict, answers: Mapping[Key, dict]
) -> Row:
    merged = {**answers.get(key, {}), **each}
    fields = _fields_of(merged, False)
    if fields is None:
        raise ValueError(f"{place} has no image or no answer")
    image, given = merged[fields.image], merged[fields.answers]
    said: list[Any] = [a.get("answer") if isinstance(a, dict) else a for a in _several(given)]
    if not said or not all(isinstance(a, str) and a.strip() for a in said):
        raise ValueError(f"{place} has no answer, or one that is no text")
    best = merged.get("multiple_choice_answer") or Counter(said).most_common(1)[0][0]
    found = Question(
        key, image, _string(merged, fields.question, place), best, tuple(said),
        str(merged.get("answer_type", "other")), str(merged.get("question_type", "")),
    )  # fmt: skip
    return Row(place, image, _file_of(folder, image), questions=[found])


def _file_of(folder: Folder, image: Key) -> str:
    """Returns the name of an image that is given by its file or its number, as MS-COCO's are."""
    names = [f"{image}.jpg", f"{image}.png"]
    if isinstance(image, int):
        names += [f"{image:012d}.jpg"]
        names += [f"COCO_{split}2014_{image:012d}.jpg" for split in ("train", "val", "test")]
    elif Path(image).suffix:
        names.insert(0, image)
    return next((name for name in names if folder.finder.find(name).is_file()), names[0])


def tables(folder: Folder) -> Splits:
    """Reads CSV, TSV and Flickr's .token files of an image and a caption a line."""
    found = [f for f in folder.files if f.suffix in (".csv", ".tsv", ".token", ".txt")]
    files = {file: table for file in found if (table := _table(folder, file))}
    if folder.val_rows or any("split" in table[1] for table in files.values()):
        return _splits_of_rows(folder, files, lambda file: _table_lines(file, files[file]))

    def rows(file: Path) -> Iterator[Row]:
        return (
            folder.row(file, place, None, line) for place, line in _table_lines(file, files[file])
        )

    return _by_split(files, rows, folder)


Table = tuple[str, list[str]]  # its delimiter, the names of its columns


def _first_line(file: Path) -> str:
    with naming(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        return lines.readline().rstrip("\r\n")


def _columns(first: str, delimiter: str) -> list[str]:
    """Returns the names in the first line of a table."""
    return [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]


def _table(folder: Folder, file: Path) -> Table | None:
    """Returns the delimiter and the columns of a file that is a table of images and captions."""
    first = _first_line(file)
    if file.suffix == ".token" or re.match(r"\S+\.\w{3,4}#\d+\t", first):
        return "\t", []
    for delimiter in (",", "\t", "|", ";"):
        names = _columns(first, delimiter)
        fields = dict.fromkeys(filter(None, names))
        if len(names) > 1 and folder.names_media(fields) and folder.is_meant(fields):
            table = delimiter, names
            if folder.caption_name(fields) or _labels_parts(folder, file, table):
                return table
    return None


def _labels_parts(folder: Folder, file: Path, table: Table) -> bool:
    """Returns whether a table without captions has classes of other media, by its first row."""
    first = next(_table_lines(file, table), None)
    return first is not None and bool(
        folder.label_name(first[1]) and folder.row(file, *first[:1], None, first[1]).parts
    )


def _table_lines(file: Path, table: Table) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the lines of a table by column, with their places."""
    delimiter, names = table
    with naming(file), file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            if not names:
                for number, line in enumerate(lines, 1):
                    image, _, caption = line.rstrip("\r\n").partition("\t")
                    image = image.rpartition("#")[0] or image
                    yield f"{file.name}:{number}", {"image": image, "caption": caption}
                return
            next(lines)
            last = 1  # line that was read
            quoting = _quoting(file, delimiter)
            reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            for cells in reader:
                last = reader.line_num + 1
                if cells:
                    place = f"{file.name}:{last}"
                    cells = [cell.strip() for cell in cells]
                    if any(cells[len(names) :]):
                        raise ValueError(
                            f"{file}: {place} has {len(cells)} cells and the first line "
                            f"{len(names)}: put texts that hold {delimiter!r} in quotes"
                        )
                    cells += [""] * (len(names) - len(cells))
                    fields = dict(zip(names, cells, strict=False))
                    fields.pop("", None)  # a column without a name: numbers of rows, as pandas' are
                    yield place, fields
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no table that can be read: {error}") from error
        except csv.Error as error:
            raise ValueError(
                f"{file}: {file.name}:{last + 1}: what begins here is no row that can be read "
                f"({error}): a text that holds quotes stands in quotes, with each of its own twice"
            ) from error


def _quoting(file: Path, delimiter: str) -> Any:
    """Returns csv's constant for whether quotes stand around cells, or are of the texts in them.

    Flickr30k's own file has spaces beside its bars and no quotes that mean anything; nor have those
    with tabs any in which they do not stand around whole cells, as Common Voice's.
    """
    if delimiter != "\t":
        return csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    with naming(file), file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            for _ in csv.reader(lines, delimiter=delimiter, strict=True):
                pass
        except csv.Error:
            return csv.QUOTE_NONE
    return csv.QUOTE_MINIMAL


def _captions_of(value: Any) -> list[Any]:
    """Returns the captions of a field: one, a list, or in a table a list that is written out."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            return list(json.loads(value))
        except json.JSONDecodeError:
            return [value]  # a caption in brackets
    return _several(value)


def _splits_of_rows(
    folder: Folder,
    files: Iterable[Path],
    lines: Callable[[Path], Iterable[tuple[str, Mapping[str, Any]]]],
) -> Splits:
    """Returns the splits that the rows of lists name, or that `data.val_rows` makes of them."""
    rows: dict[str, list[Row]] = {}
    for file in files:
        for place, line in lines(file):
            row = folder.row(file, place, _key(line) if file.suffix == ".jsonl" else None, line)
            rows.setdefault(folder.split_of(file, place, line) or WHOLE, []).append(row)
    if not rows:
        return {}
    first = next(iter(files))
    return {
        split: partial(listing_of, first, each, folder.finder, split)
        for split, each in rows.items()
    }


def image_folder(folder: Folder) -> Splits:
    """Reads Hugging Face's imagefolder: `metadata.jsonl` beside the files that it names.

    (`metadata.csv` is read as a table.) Where there is none, JSON lines of another name are read
    that name sounds, shapes or videos.
    """
    lists = [file for file in folder.files if file.suffix == ".jsonl"]
    files = [file for file in lists if file.name == "metadata.jsonl"]
    files = files or [file for file in lists if _names_parts(folder, file)]
    if not folder.is_meant({}):
        files = [f for f in files if any(folder.is_meant(row) for _, row in _json_lines(f))]
    if folder.val_rows:
        return _splits_of_rows(folder, files, _json_lines)

    def rows(file: Path) -> Iterator[Row]:
        return (_object_row(folder, file, *each) for each in _json_lines(file))

    return _by_split(files, rows, folder)


def _names_parts(folder: Folder, file: Path) -> bool:
    _, fields = next(_json_lines(file), ("", {}))
    first = str(fields.get(folder.image_name(fields)))
    named = folder.part_names(fields) or medium_of(first) != "image"
    return bool(named and (folder.caption_name(fields) or folder.label_name(fields)))


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of JSON lines, with their places."""
    with naming(file), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file.name}:{number}"
                yield place, _line_object(place, line)


def _line_object(place: str, line: str | bytes) -> dict[str, Any]:
    """Returns the object that a line or a small file holds."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place}: must be an object, is {json.dumps(found):.40}")
    return found


def librispeech(folder: Folder) -> Splits:
    """Reads LibriSpeech: `*.trans.txt` with lines of an id and what is said in its sound.

    Beside train, val and test, which hold every folder of theirs, each folder (test-clean,
    test-other) is a split of its own.
    """
    files = sorted(folder.path.rglob("*.trans.txt"))
    found: dict[str, list[Path]] = {}
    for file in files:
        above = file.relative_to(folder.path).parts[:-1]
        top = next((name for name in above if split_named(name)), "")
        for split in dict.fromkeys((split_named(top), top)) if top else (WHOLE,):
            found.setdefault(split, []).append(file)

    def rows(file: Path) -> Iterator[Row]:
        where = file.parent.relative_to(folder.path)
        sounds = {path.stem: path.name for path in sounds_in(file.parent)}
        with naming(file), file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                name, _, text = line.strip().partition(" ")
                if name:
                    sound = (where / sounds.get(name, f"{name}.flac")).as_posix()
                    yield Row(f"{file.name}:{number}", name, None, [text], parts={"audio": sound})

    def listed(these: Sequence[Path]) -> Listing:
        return listing_of(these[0], (row for file in these for row in rows(file)), folder.finder)

    order = sorted(found, key=lambda split: (split != "train", split))
    return {split: partial(listed, found[split]) for split in order}


def sounds_in(folder: Path) -> list[Path]:
    """Returns the sounds below a folder."""
    return [path for path in media_in(folder) if medium_of(path) == "audio"]


def audiocaps(folder: Folder) -> Splits:
    """Reads AudioCaps: tables of `youtube_id`, `start_time` and `caption`.

    A clip is called by its id and its start, or one of them, or the number of the caption.
    """
    tables = [file for file in folder.files if file.suffix == ".csv"]
    heads = {file: _columns(_first_line(file), ",") for file in tables}
    files = [
        file
        for file, names in heads.items()
        if {"youtube_id", "caption"} <= set(names) and not folder.names_media(dict.fromkeys(names))
    ]
    if not files:
        return {}
    found = sounds_in(folder.path)
    sounds = {path.stem: path.relative_to(folder.path).as_posix() for path in found}

    def rows(file: Path) -> Iterator[Row]:
        for place, fields in _table_lines(file, (",", heads[file])):
            clip, start = fields["youtube_id"], fields.get("start_time", "")
            key, number = f"{clip}_{start}", fields.get("audiocap_id", "")
            tried = (key, clip, f"Y{clip}", f"Y{key}", number)
            sound = next((sounds[name] for name in tried if name in sounds), f"{key}.wav")
            yield Row(place, key, None, [fields["caption"]], parts={"audio": sound})

    return _by_split(files, rows, folder)


def texts_beside(folder: Folder) -> Splits:
    """Reads pictures with a `.txt` of the same name beside them, a caption a line."""
    found = pictures_in(folder.path)
    pictures = [p for p in found if p.with_suffix(".txt").is_file()]

    def rows(picture: Path) -> Iterator[Row]:
        text = picture.with_suffix(".txt")
        with naming(text):
            try:
                lines = text.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{text}, byte {error.start}: not UTF-8") from error
        relative = picture.relative_to(folder.path).as_posix()
        yield Row(relative, None, relative, [line for line in lines if line.strip()] or [""])

    without = [p for p in found if not p.with_suffix(".txt").is_file()]
    return _telling(_by_split(pictures, rows, folder), without, folder, "no .txt beside it")


def _telling(splits: Splits, files: Iterable[Path], folder: Folder, what: str) -> Splits:
    """Returns the splits with files that were passed over among their problems."""
    passed = _grouped(files, folder)

    def told(split: str) -> Listing:
        found = splits[split]()
        names = [file.relative_to(folder.path).as_posix() for file in passed.get(split, ())]
        problems = [Problem(name, what, "left out") for name in names]
        return replace(found, image_problems=(*found.image_problems, *problems))

    return {split: partial(told, split) for split in splits}


def class_folders(folder: Folder) -> Splits:
    """Reads a folder of pictures or sounds a class, whose name is the caption; else of videos.

    Clips beside pictures are not read: cameras write one with each.
    """
    media = media_in(folder.path)
    still = [p for p in media if medium_of(p) in ("image", "audio")]
    return _classes(folder, still or [p for p in media if medium_of(p) == "video"])


def shape_folders(folder: Folder) -> Splits:
    """Reads a folder of shapes a class; splits may be in it, as ModelNet's: `chair/train/1.off`."""
    return _classes(folder, [p for p in media_in(folder.path) if medium_of(p) == "points"], 2)


def _classes(folder: Folder, files: Iterable[Path], folders: int = 1) -> Splits:
    """Returns the splits of files in folders of classes, told by one of the first `folders`."""
    pictures = [p for p in files if len(p.relative_to(folder.path).parts) > 1]

    def class_of(file: Path) -> str:
        *above, own = file.relative_to(folder.path).parts[:-1]
        return above[-1] if above and folders > 1 and split_named(own) else own

    classes = {class_of(p) for p in pictures if p.parent.name not in ("images", *MEDIA)}
    if len({name for name in classes if not split_named(name)}) < 2:
        return {}

    def rows(picture: Path) -> Iterator[Row]:
        relative = picture.relative_to(folder.path).as_posix()
        name = in_words(class_of(picture))
        if (medium := medium_of(picture)) == "image":
            yield Row(relative, None, relative, [name], labels=[name])
        else:
            yield Row(relative, None, None, [name], parts={medium: relative}, labels=[name])

    return _by_split(pictures, rows, folder, folders, _called_as_splits(pictures, folder))


def _called_as_splits(files: Iterable[Path], folder: Folder) -> set[str]:
    """Returns the classes whose folders could be taken for splits: trains beside cars and boats.

    Theirs hold files as those of other classes do, and no folders of classes.
    """
    places = [path.relative_to(folder.path).parts for path in files]
    within = {parts[0] for parts in places if len(parts) > 2}
    beside = {parts[0] for parts in places} - within
    return beside if any(not split_named(name) for name in beside) else set()


def webdataset(folder: Folder) -> Splits:
    """Reads WebDataset tars as img2dataset writes them: `KEY.jpg` beside `KEY.txt` or `.json`."""
    tars = [file for file in folder.files if file.suffix == ".tar"]

    def captions(place: str, texts: Mapping[str, str]) -> list[Any]:
        for suffix in (f".{folder.caption}",) if folder.caption else (".txt", ".caption"):
            if suffix in texts:
                return [texts[suffix]]
        if ".json" not in texts:
            return []
        fields = _line_object(f"{place}.json", texts[".json"])
        return _several(fields.get(folder.caption_name(fields)))

    return _shard_splits(
        folder, tars, lambda tar: shards.open_tar(tar, SUFFIXES, folder.cache), captions
    )


def parquet(folder: Folder) -> Splits:
    """Reads parquet files with the bytes of images, as Hugging Face's datasets write them."""
    files = {}
    for file in (each for each in folder.files if each.suffix == ".parquet"):
        columns = shards.parquet_columns(file)
        image, caption = folder.image_name(columns), folder.caption_name(columns)
        if image and caption and "binary" in columns[image]:
            files[file] = (image, caption)

    def opened(file: Path) -> shards.Shard:
        if folder.cache is None:
            raise ValueError(f"{file}: pictures of parquet files need a cache: set data.cache_dir")
        return shards.open_parquet(file, *files[file], folder.cache)

    def captions(place: str, texts: Mapping[str, Any]) -> list[Any]:
        return [each for value in texts.values() for each in _several(value)]

    return _shard_splits(folder, files, opened, captions)


def _shard_splits(
    folder: Folder,
    files: Iterable[Path],
    opened: Callable[[Path], shards.Shard],
    captions: Callable[[str, Mapping[str, Any]], list[Any]],
) -> Splits:
    """Returns the splits of files that hold pictures with their texts."""

    def listed(these: Sequence[Path]) -> Listing:
        found = [opened(file) for file in these]
        spans, rows = shards.spans_of(found), []
        samples = ((shard.file.name, sample) for shard in found for sample in shard.samples)
        for number, (file, each) in enumerate(samples):
            place = f"{file}/{each.key}"
            image = Stored(spans, number, each.name, each.size) if each.name else None
            rows.append(Row(place, place, image, captions(place, each.texts)))
        stamp = json.dumps([shard.stamp for shard in found])
        return replace(listing_of(these[0], rows, folder.finder), stamp=stamp)

    return {split: partial(listed, these) for split, these in _grouped(files, folder).items()}


def _several(value: Any, separator: str = "") -> list[Any]:
    """Returns a caption, or a list of them, as a list; texts may hold several with a separator."""
    if separator and isinstance(value, str):
        return [each.strip() for each in value.split(separator)]
    return list(value) if isinstance(value, list | tuple) else [value]


def _first(members: Sequence[Any]) -> Mapping[str, Any]:
    """Returns the first member of a list where that is an object."""
    return members[0] if isinstance(members[0], dict) else {}


def _string(fields: Mapping[str, Any], key: str, place: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {key} must be a text, is {json.dumps(value):.40}")
    return value


# In the order in which a folder is looked at: the more a layout asks for, the earlier.
LAYOUTS: dict[str, tuple[str, Callable[[Folder], Splits]]] = {
    "coco": ("MS-COCO: annotations/captions_*.json", coco_captions),
    "karpathy": ("Karpathy's dataset_*.json with sentences and splits", karpathy),
    "msrvtt": ("MSR-VTT's JSON of videos and sentences", msrvtt),
    "llava": ("LLaVA's conversations in JSON", llava),
    "lavis": ("JSON lists of image and caption", lavis),
    "librispeech": ("LibriSpeech: *.trans.txt beside the sounds", librispeech),
    "audiocaps": ("AudioCaps: csv of youtube_id, start_time and caption", audiocaps),
    "questions": ("JSON files of questions (OK-VQA, VizWiz, TextVQA, GQA)", questions),
    "imagefolder": ("metadata.jsonl with file_name and text", image_folder),
    "table": ("CSV, TSV or .token of a file and its caption or class", tables),
    "webdataset": ("WebDataset tars: KEY.jpg with KEY.txt or KEY.json", webdataset),
    "parquet": ("parquet files with the bytes of images and captions", parquet),
    "text_files": ("pictures with a .txt of the same name", texts_beside),
    "classes": ("a folder of pictures, sounds or videos for each class", class_folders),
    # Apart, for a mesh often has pictures beside it.
    "shapes": ("a folder of shapes for each class", shape_folders),
}


# The layouts in which the user may name a field, by the field.
NAMED_IN = {
    "image": ("lavis", "imagefolder", "table", "parquet"),
    "caption": ("lavis", "imagefolder", "table", "parquet", "webdataset"),
    "label": ("lavis", "imagefolder", "table"),
}


def _needed(folder: Folder) -> str:
    """Says which fields a list must have, for messages."""
    if folder.is_meant({}):
        images, captions = ", ".join(IMAGE_NAMES), ", ".join(CAPTION_NAMES)
        usual_names = f"an image ({images}) and a caption ({captions})"
        return f"{usual_names}, or data.fields.image and data.fields.caption name them. "
    given = {name: getattr(folder, name) for name in NAMED_IN}
    return ", ".join(f"data.fields.{k}={name!r}" for k, name in given.items() if name) + ". "


def nearest(folder: Folder) -> str:
    """Says what a folder without a known layout comes closest to, and lacks; '' for nothing."""
    for sub in (p for p in sorted(folder.path.glob("*")) if p.is_dir() and p.name[0] != "."):
        inner = replace(folder, path=sub)
        named = (name for name, (_, of) in LAYOUTS.items() if name != "classes" and of(inner))
        if name := next(named, ""):
            return f"Nearest is {sub}, which is laid out as {name}: set data.dir={sub}. "
    for file in folder.files:
        if file.name.startswith("captions_") and file.suffix == ".json":
            return f"Nearest is coco: move {file.name} into {folder.path / 'annotations'}. "
        if file.suffix in (".csv", ".tsv", ".jsonl"):
            with file.open(encoding="utf-8", errors="replace") as lines:
                first = lines.readline().strip()
            begins = f"which begins {first[:80]!r}: it must have {_needed(folder)}"
            return f"Nearest is {file.name}, {begins}"
        if file.suffix in (".tar", ".parquet"):
            return f"Nearest is {file.name}, in which no picture with a caption was found. "
    for file, data in folder.json_lists:
        fields = _first(data) if isinstance(data, list) and data else data
        if isinstance(fields, dict):
            keys = ", ".join(list(fields)[:8])
            needs = f"a list of objects needs {_needed(folder)}"
            return f"Nearest is {file.name}, which has {keys}: {needs}"
    if pictures := pictures_in(folder.path):
        first, text = pictures[0].name, pictures[0].with_suffix(".txt").name
        return (
            f"Nearest is text_files: {len(pictures):,} pictures have no texts; put {text} beside "
            f"{first}, or a metadata.csv with file_name,text into the folder. "
        )
    return ""
