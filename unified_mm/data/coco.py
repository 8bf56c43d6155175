"""Reader of images, captions, questions and foils on disk, in the layout of MS-COCO.

Chen et al. 2015 (arXiv:1504.00325) for captions; Goyal et al. 2017 (arXiv:1612.00837), VQA v2,
for questions. Layouts that are read (see `find_splits`):

    train2017/*.jpg  val2017/*.jpg  annotations/captions_train2017.json  captions_val2017.json
    images/*.jpg                    annotations/captions_{train,val,test,...}.json
    audio/*.wav                     the same files, with `audio` and `audio_id`

Questions with answers beside them (see `read_questions`), under our names or VQA v2's own:

    annotations/questions_train.json                      annotations/answers_train.json
    v2_OpenEnded_mscoco_train2014_questions.json          v2_mscoco_train2014_annotations.json
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from unified_mm.data import checked_json
from unified_mm.data.checked_json import Node
from unified_mm.data.listing import (
    MEDIA,
    Entry,
    Finder,
    Foil,
    Key,
    Listing,
    Question,
    Row,
    id_hint,
    listing_of,
    names_file,
    no_text,
    stays_below,
    what_is_there,
)
from unified_mm.data.records import Problem, Text
from unified_mm.files import naming

_PREFIX = "captions_"
_VQA_FILES = ("v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json")


def find_splits(folder: str | Path) -> dict[str, Path]:
    """Returns the captions file of each split in a data folder, by the split's name.

    A split is named by what follows `captions_`, without a trailing year; two years of one
    split keep theirs (`train2014`, `train2017`).

    Raises:
      FileNotFoundError: there is no such folder, or no captions file in it; the message says what
        was looked for and what is there.
      ValueError: the folder cannot be read, or is a TFDS dataset.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        fault = "is a file" if os.path.exists(folder) else "does not exist"
        raise FileNotFoundError(
            f"the data folder {folder} {fault}: "
            "set data.dir to a folder with annotations/captions_*.json in it"
        )
    with naming(f"data.dir={folder}"):
        files = sorted((folder / "annotations").glob(f"{_PREFIX}*.json"))
    if not files:
        if (folder / "dataset_info.json").is_file():
            raise ValueError(f"{folder} is a TFDS dataset: set data.source to 'tfds'")
        raise FileNotFoundError(
            f"no annotations/{_PREFIX}*.json in {folder}; {what_is_there(folder)}. Set data.dir "
            "to a folder in MS-COCO's layout: train2017/ or images/ beside annotations/"
        )
    short = Counter(_without_year(_suffix(file)) for file in files)
    names = {file: _without_year(_suffix(file)) for file in files}
    return {name if short[name] == 1 else _suffix(file): file for file, name in names.items()}


def read_captions(folder: str | Path, split: str) -> Listing:
    """Reads the images and captions of a split in the order of the file, without decoding images.

    Images without captions are kept, and so are entries whose file_name is null or empty (examples
    without image). Beside it or in its place, `audio` and `video` may name other files. Empty
    captions, captions of unlisted images, repeated annotations, and ids that name two different
    files are left out and counted.

    Raises:
      FileNotFoundError: there is no data folder, or no image folder in it.
      ValueError: the split is unknown, the file is malformed (with file and position) or lists no
        image, or a file name leads out of the folder.
    """
    folder = Path(folder)
    path = _captions_file(folder, split)
    data = checked_json.read(path)
    if data.has("audio") and not data.has("images"):
        return _sounds(data, folder)
    listed, image_problems = _image_files(data.items("images"), folder)
    annotations = data.items("annotations")
    captions, caption_problems, orphans = _captions(annotations, set(listed))
    if not listed:
        raise data.error("is empty: the file lists no image", "images")
    files = {key: names[0] for key, names in listed.items() if len(names) == 1}
    pictures = [names["image"] for names in files.values() if "image" in names]
    home = _image_folder(folder, _suffix(path), pictures)
    finder = Finder(folder, [home] if home else [])
    entries = tuple(
        Entry(
            key,
            next(iter(names.values()), None),
            finder.find(names["image"]) if "image" in names else None,
            tuple(Text("", caption) for caption in captions.get(key, ())),
            tuple((each, finder.find(name)) for each, name in names.items() if each != "image"),
        )
        for key, names in files.items()
    )
    return Listing(
        path,
        entries,
        frozenset(listed),
        len(annotations),
        _directional(data),
        tuple(image_problems),
        tuple(caption_problems),
        id_hint(listed, orphans),
        finder.looked,
    )


def _sounds(data: checked_json.Node, folder: Path) -> Listing:
    """Returns the listing of a captions file that has `audio`, and `audio_id` in annotations."""
    files = {each.id("id"): each for each in data.items("audio")}
    sounds = {key: {"audio": each.string("file_name")} for key, each in files.items()}
    rows = [Row(each.place, key, None, parts=sounds[key]) for key, each in files.items()]
    lost = []
    for each in data.items("annotations"):
        if (key := each.id("audio_id")) in sounds:
            rows.append(Row(each.place, key, None, [each.get("caption")], parts=sounds[key]))
        else:
            lost.append(Problem(each.place, "caption of a sound that is not listed", "left out"))
    home = folder / "audio"
    listing = listing_of(data.file, rows, Finder(folder, [home] if home.is_dir() else []))
    return replace(
        listing,
        annotations=listing.annotations + len(lost),
        caption_problems=(*listing.caption_problems, *lost),
        hint=id_hint(sounds, (each.id("audio_id") for each in data.items("annotations"))),
    )


def has_questions(folder: str | Path, split: str) -> bool:
    """Returns whether a split has questions and answers beside its captions."""
    return _question_files(folder, split) is not None


def questions_serve_others(folder: str | Path, split: str) -> bool:
    """Returns whether a split's questions are VQA v2's own files, which cover several years."""
    files = _question_files(folder, split)
    return files is not None and files[0].name.startswith(_VQA_FILES[0].partition("{}")[0])


def no_questions(folder: str | Path, split: str) -> str:
    """Returns an error message: the split has no questions, and what was looked for."""
    return (
        f"{folder} has no questions with answers for the split {split!r}: looked for "
        f"annotations/questions_{split}.json with answers_{split}.json, and for VQA v2's "
        f"{_VQA_FILES[0].format(split)} with {_VQA_FILES[1].format(split)}, with a year or "
        "without"
    )


def read_questions(folder: str | Path, split: str) -> tuple[Question, ...]:
    """Reads a split's questions with their answers, in VQA v2's layout.

    The first complete pair of files is read, of:

    1. `annotations/questions_{name}.json` and `answers_{name}.json`, each by the name of the
       captions file or else of the split;
    2. `v2_OpenEnded_mscoco_{name}_questions.json` and `v2_mscoco_{name}_annotations.json`, in
       `annotations/` or else in the folder itself, by the name of the captions file;
    3. the same by names that differ only in the year, in alphabetical order: an image has one
       id in all years of MS-COCO, so `train2014` serves `captions_train2017.json`.

    A file may hold questions on images that are not in the split.

    Raises:
      FileNotFoundError: there is no such pair.
      ValueError: a file is malformed (with file and position), or a question has no words or no
        answer.
    """
    files = _question_files(folder, split)
    if files is None:
        raise FileNotFoundError(no_questions(folder, split))
    questions_path, answers_path = files
    answers_file = checked_json.read(answers_path)
    answers = {node.id("question_id"): node for node in answers_file.items("annotations")}
    questions = []
    for node in checked_json.read(questions_path).items("questions"):
        key = node.id("question_id")
        if key not in answers:
            raise node.error(f"(question {key!r}) has no answer in {answers_file.file}")
        questions.append(_question(node, answers[key]))
    return tuple(questions)


def has_foils(folder: str | Path, split: str) -> bool:
    """Returns whether a split has foils beside its captions."""
    return _beside(folder, split, "foils").is_file()


def read_foils(folder: str | Path, split: str) -> tuple[Foil, ...]:
    """Reads `annotations/foils_{split}.json`, a list of {image_id, caption, foil, kind}.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is malformed; the message gives file and position.
    """
    foils = checked_json.read(_beside(folder, split, "foils")).items()
    texts = ("caption", "foil", "kind")
    return tuple(Foil(node.id("image_id"), *map(node.string, texts)) for node in foils)


def _question(question: Node, answer: Node) -> Question:
    return Question(
        id=question.id("question_id"),
        image_id=question.id("image_id"),
        question=_words(question, "question"),
        answer=_words(answer, "multiple_choice_answer"),
        answers=_some(answer, tuple(node.string("answer") for node in answer.items("answers"))),
        answer_type=answer.string("answer_type"),
        question_type=answer.string("question_type"),
    )


def _words(node: Node, key: str) -> str:
    text = node.string(key)
    if not text.strip():
        raise node.error("is empty", key)
    return text


def _some(node: Node, answers: tuple[str, ...]) -> tuple[str, ...]:
    if not answers:
        raise node.error("is empty: a question needs an answer", "answers")
    return answers


def _directional(data: Node) -> bool:
    info = Node(data.file, "info", data.get("info")) if data.has("info") else None
    return info is not None and info.has("directional") and info.get("directional") is True


def _image_files(
    images: list[Node], folder: Path
) -> tuple[dict[Key, list[dict[str, str]]], list[Problem]]:
    """Returns the distinct file names of each image id, by modality, and the problems found."""
    files: dict[Key, list[dict[str, str]]] = {}
    owners: dict[str, Key] = {}
    problems = []
    for node in images:
        found, key = _file_names(node, folder), node.id("id")
        if any(owners.setdefault(name, key) != key for name in found.values()):
            problems.append(Problem(node.place, "file of another image id too", "converted"))
        names = files.setdefault(key, [])
        if found in names:
            problems.append(Problem(node.place, "image listed twice", "converted"))
            continue
        if names:
            problems.append(Problem(node.place, "image id with two different files", "left out"))
        names.append(found)
    return files, problems


def _file_names(node: Node, folder: Path) -> dict[str, str]:
    """Returns the names of an example's files by modality; one without any has texts alone.

    Raises:
      ValueError: a name leads out of the data folder.
    """
    found = {}
    for modality in MEDIA:
        key = "file_name" if modality == "image" else modality
        if not node.has(key):
            continue
        # Beside a picture's file, others' fields may be something else, such as a count of points.
        if "image" in found and not names_file(node.get(key)):
            continue
        found[modality] = name = node.string(key)
        if _leads_out(name, folder):
            raise node.error(f"leads out of the data folder: {name!r}", key)
    return found


def _leads_out(name: str, folder: Path) -> bool:
    if stays_below(name):
        return False
    # Below one folder at least, the images' own.
    inside = os.path.relpath(os.path.join(folder, "images", name), folder)
    return inside == ".." or inside.startswith("../")


def _captions(
    annotations: list[Node], images: set[Key]
) -> tuple[dict[Key, list[str]], list[Problem], list[Key]]:
    """Returns the captions of each image id in order, the problems, and the ids not listed."""
    captions: dict[Key, list[str]] = {}
    by_id: dict[Key, tuple[Key, str]] = {}
    problems = []
    orphans = []
    for node in annotations:
        image, given = node.id("image_id"), node.get("caption")
        if what := no_text(given):
            problems.append(Problem(node.place, what, "left out"))
            continue
        caption = given.strip()
        earlier = None
        if node.has("id"):
            own = node.id("id")
            earlier = by_id.get(own)
            by_id[own] = (image, caption)
        fault = _caption_fault(image, caption, earlier, images)
        if fault:
            problems.append(Problem(node.place, *fault))
        if image not in images:
            orphans.append(image)
        if not fault or fault[1] == "converted":
            captions.setdefault(image, []).append(caption)
    return captions, problems, orphans


def _caption_fault(
    image: Key, caption: str, earlier: tuple[Key, str] | None, images: set[Key]
) -> tuple[str, str] | None:
    """Returns what is wrong with an annotation and what is done about it, or None for a good one.

    Args:
      image: the image id of the annotation.
      caption: its caption.
      earlier: the image id and caption of an earlier annotation with the same id, if any.
      images: the ids of the listed images.
    """
    if image not in images:
        return "caption of an image that is not listed", "left out"
    if earlier == (image, caption):
        return "annotation listed twice", "left out"
    if earlier is not None:
        return "annotation id of another annotation", "converted"
    return None


def _captions_file(folder: Path, split: str) -> Path:
    splits = find_splits(folder)
    if split not in splits:
        raise ValueError(
            f"{folder} has no split {split!r}: looked for annotations/{_PREFIX}{split}*.json, "
            f"found the splits {', '.join(splits)}"
        )
    return splits[split]


def files_beside(folder: str | Path, split: str) -> dict[str, Path]:
    """Returns the existing files of a split's questions, answers and foils, by file name.

    The names are those under which the files are found beside a split whose captions lie
    elsewhere, as in TFDS shards.
    """
    files = {}
    if has_foils(folder, split):
        files[f"foils_{split}.json"] = _beside(folder, split, "foils")
    pair = _question_files(folder, split) or ()
    own = questions_serve_others(folder, split)
    for kind, file in zip(("questions", "answers"), pair):
        files[file.name if own else f"{kind}_{split}.json"] = file
    return files


def _named_after(folder: str | Path, split: str) -> str:
    """Returns what a split's files are named after: its captions file, or else the split.

    The split's own name is used where the folder has no captions file, as captions may lie
    elsewhere, such as in TFDS shards.
    """
    annotations = Path(folder) / "annotations"
    if not any(annotations.glob(f"{_PREFIX}*.json")):
        return split
    return _suffix(_captions_file(Path(folder), split))


def _beside(folder: str | Path, split: str, kind: str) -> Path:
    """Returns a split's file of another kind, named like its captions file or like the split."""
    annotations = Path(folder) / "annotations"
    suffixes = (_named_after(folder, split), split)
    names = [annotations / f"{kind}_{suffix}.json" for suffix in suffixes]
    return next((path for path in names if path.is_file()), names[0])


def _question_files(folder: str | Path, split: str) -> tuple[Path, Path] | None:
    """Returns a split's questions file and answers file, in the order of `read_questions`."""
    suffix = _named_after(folder, split)
    pairs = [(_beside(folder, split, "questions"), _beside(folder, split, "answers"))]
    places = (Path(folder) / "annotations", Path(folder))
    for name in (suffix, *_other_years(places, suffix)):
        questions, answers = (file.format(name) for file in _VQA_FILES)
        pairs += [(place / questions, place / answers) for place in places]
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), None)


def _other_years(places: tuple[Path, ...], suffix: str) -> list[str]:
    """Returns the names of the same split in VQA v2's files of another year, or of none."""
    before, after = _VQA_FILES[0].split("{}")
    found = {
        path.name.removeprefix(before).removesuffix(after)
        for place in places
        for path in place.glob(f"{before}*{after}")
    }
    short = _without_year(suffix)
    return sorted(name for name in found if name != suffix and _without_year(name) == short)


def _image_folder(folder: Path, suffix: str, files: list[str]) -> Path | None:
    """Returns the folder of a split's images: the first known place that holds one of them.

    A split without image files has none, nor has one whose names are relative to the data folder.

    Raises:
      FileNotFoundError: none of the places exists, and no image is found elsewhere in the folder.
    """
    if not files:
        return None
    places = (folder / suffix, folder / "images" / suffix, folder / "images")
    there = [place for place in places if place.is_dir()]
    if not there and any(Finder(folder).find(file).is_file() for file in files[:100]):
        return None
    if not there:
        raise FileNotFoundError(
            f"no images of {_PREFIX}{suffix}.json: looked for {suffix}/ and images/ in {folder}; "
            f"{what_is_there(folder)}. Put the pictures (such as {files[0]}) into one of the two"
        )
    sample = files[:100]
    return next((p for p in there if any(os.path.isfile(p / f) for f in sample)), there[0])


def _suffix(captions: Path) -> str:
    return captions.stem.removeprefix(_PREFIX)


def _without_year(suffix: str) -> str:
    return re.sub(r"(?<=\D)\d{4}$", "", suffix)
