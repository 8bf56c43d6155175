"""The one reader of images and captions on disk: MS-COCO's layout.

Chen et al. 2015 (arXiv:1504.00325) for captions; Goyal et al. 2017 (arXiv:1612.00837), VQA v2,
for questions. Layouts that are read (see `find_splits`):

    train2017/*.jpg  val2017/*.jpg  annotations/captions_train2017.json  captions_val2017.json
    images/*.jpg                    annotations/captions_{train,val,test,...}.json
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from unified_mm.data import checked_json
from unified_mm.data.checked_json import Node
from unified_mm.data.records import Problem, Text

Key = int | str
_PREFIX = "captions_"


@dataclass(frozen=True)
class Entry:
    """An image as the annotations list it: `file` is its name in them, `path` where it lies."""

    id: Key
    file: str | None
    path: Path | None
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Captions:
    """A captions file. `directional`: its texts name sides throughout, so never mirror.

    `listed` counts different image ids, those that were left out included.
    """

    path: Path
    entries: tuple[Entry, ...]
    listed: int
    directional: bool
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Question:
    """A question of VQA v2 with its answers: `answer` is the most frequent of `answers`."""

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
    """A caption and the same caption made wrong in one way, which `kind` names."""

    image_id: Key
    caption: str
    foil: str
    kind: str


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The splits of a data folder: name -> captions file, by name.

    A split is named by what follows `captions_`, without a trailing year; two years of one
    split keep theirs (`train2014`, `train2017`). Raises FileNotFoundError that says what was
    looked for and what is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data folder {folder} {'is a file' if folder.exists() else 'does not exist'}: "
            "set data.dir to a folder with annotations/captions_*.json in it"
        )
    files = sorted((folder / "annotations").glob(f"{_PREFIX}*.json"))
    if not files:
        raise FileNotFoundError(
            f"no annotations/{_PREFIX}*.json in {folder}; {_what_is_there(folder)}. Set data.dir "
            "to a folder in MS-COCO's layout: train2017/ or images/ beside annotations/"
        )
    short = Counter(_without_year(_suffix(file)) for file in files)
    names = {file: _without_year(_suffix(file)) for file in files}
    return {name if short[name] == 1 else _suffix(file): file for file, name in names.items()}


def read_captions(folder: str | Path, split: str) -> Captions:
    """The images and captions of a split, in the order of the file, nothing decoded yet.

    Kept: an image without captions, and an entry whose file_name is null or empty (an example
    without image). Left out and counted: empty captions, captions of unlisted images, repeated
    annotations, ids that name two different files. Raises FileNotFoundError or ValueError for
    an unknown split or no image folder, ValueError with file and position for a malformed file.
    """
    folder = Path(folder)
    path = _captions_file(folder, split)
    data = checked_json.read(path)
    listed, image_problems = _image_files(data.items("images"))
    captions, caption_problems = _captions(data.items("annotations"), set(listed))
    files = {key: names[0] for key, names in listed.items() if len(names) == 1}
    home = _image_folder(folder, _suffix(path), [f for f in files.values() if f])
    entries = tuple(
        Entry(key, file, home / file if home and file else None, tuple(captions.get(key, ())))
        for key, file in files.items()
    )
    problems = (*image_problems, *caption_problems)
    return Captions(path, entries, len(listed), _directional(data), problems)


def has_questions(folder: str | Path, split: str) -> bool:
    """Whether a split has questions and answers beside its captions."""
    return all(_beside(folder, split, kind).is_file() for kind in ("questions", "answers"))


def read_questions(folder: str | Path, split: str) -> tuple[Question, ...]:
    """`annotations/questions_{split}.json` with `answers_{split}.json`, in VQA v2's layout.

    Raises FileNotFoundError, ValueError with file and position for a malformed file, and
    ValueError for a question without an answer.
    """
    answers_file = checked_json.read(_beside(folder, split, "answers"))
    answers = {node.id("question_id"): node for node in answers_file.items("annotations")}
    questions = []
    for node in checked_json.read(_beside(folder, split, "questions")).items("questions"):
        key = node.id("question_id")
        if key not in answers:
            raise node.error(f"(question {key!r}) has no answer in {answers_file.file}")
        questions.append(_question(node, answers[key]))
    return tuple(questions)


def has_foils(folder: str | Path, split: str) -> bool:
    """Whether a split has foils beside its captions."""
    return _beside(folder, split, "foils").is_file()


def read_foils(folder: str | Path, split: str) -> tuple[Foil, ...]:
    """`annotations/foils_{split}.json`: a list of {image_id, caption, foil, kind}.

    Raises FileNotFoundError, and ValueError with file and position for a malformed file.
    """
    foils = checked_json.read(_beside(folder, split, "foils")).items()
    texts = ("caption", "foil", "kind")
    return tuple(Foil(node.id("image_id"), *map(node.string, texts)) for node in foils)


def _question(question: Node, answer: Node) -> Question:
    return Question(
        id=question.id("question_id"),
        image_id=question.id("image_id"),
        question=question.string("question"),
        answer=answer.string("multiple_choice_answer"),
        answers=tuple(node.string("answer") for node in answer.items("answers")),
        answer_type=answer.string("answer_type"),
        question_type=answer.string("question_type"),
    )


def _directional(data: Node) -> bool:
    info = Node(data.file, "info", data.get("info")) if data.has("info") else None
    return info is not None and info.has("directional") and info.get("directional") is True


def _image_files(images: list[Node]) -> tuple[dict[Key, list[str | None]], list[Problem]]:
    """Image id -> its different file names (None: an example without image)."""
    files: dict[Key, list[str | None]] = {}
    problems = []
    for node in images:
        name = node.string("file_name") if node.has("file_name") else None
        names = files.setdefault(node.id("id"), [])
        if name in names:
            problems.append(Problem(node.place, "image listed twice", "converted"))
            continue
        if names:
            problems.append(Problem(node.place, "image id with two different files", "left out"))
        names.append(name)
    return files, problems


def _captions(
    annotations: list[Node], images: set[Key]
) -> tuple[dict[Key, list[str]], list[Problem]]:
    """Image id -> its captions in order, and what was wrong with annotations."""
    captions: dict[Key, list[str]] = {}
    by_id: dict[Key, tuple[Key, str]] = {}
    problems = []
    for node in annotations:
        image, caption = node.id("image_id"), node.string("caption").strip()
        earlier = None
        if node.has("id"):
            earlier = by_id.get(node.id("id"))
            by_id[node.id("id")] = (image, caption)
        fault = _caption_fault(image, caption, earlier, images)
        if fault:
            problems.append(Problem(node.place, *fault))
        if not fault or fault[1] == "converted":
            captions.setdefault(image, []).append(caption)
    return captions, problems


def _caption_fault(
    image: Key, caption: str, earlier: tuple[Key, str] | None, images: set[Key]
) -> tuple[str, str] | None:
    """What is wrong with an annotation, and what is done; `earlier` has the same id."""
    if image not in images:
        return "caption of an image that is not listed", "left out"
    if not caption:
        return "empty caption", "left out"
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


def _beside(folder: str | Path, split: str, kind: str) -> Path:
    """The file of another kind for a split, named like its captions file or like the split."""
    captions = _captions_file(Path(folder), split)
    names = [captions.parent / f"{kind}_{name}.json" for name in (_suffix(captions), split)]
    return next((path for path in names if path.is_file()), names[0])


def _image_folder(folder: Path, suffix: str, files: list[str]) -> Path | None:
    """Where the images of a split lie: the first known place that holds one of them."""
    if not files:
        return None
    places = (folder / suffix, folder / "images" / suffix, folder / "images")
    there = [place for place in places if place.is_dir()]
    if not there:
        raise FileNotFoundError(
            f"no images of {_PREFIX}{suffix}.json: looked for {suffix}/ and images/ in {folder}; "
            f"{_what_is_there(folder)}. Put the pictures (such as {files[0]}) into one of the two"
        )
    sample = files[:100]
    return next((p for p in there if any((p / f).is_file() for f in sample)), there[0])


def _what_is_there(folder: Path) -> str:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"there is {', '.join(names[:10])}{more}" if names else "it is empty"


def _suffix(captions: Path) -> str:
    return captions.stem.removeprefix(_PREFIX)


def _without_year(suffix: str) -> str:
    return re.sub(r"(?<=\D)\d{4}$", "", suffix)
