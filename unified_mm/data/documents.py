"""Interleaved documents: items of modalities and texts in one order, read from JSON lines.

One document a line, in one of four forms, which may be mixed (the form is known by its key):

    {"text": "A cat <image> and a dog <image>.", "images": ["cat.jpg", "dog.jpg"]}
    {"texts": ["A cat", null], "images": [null, "cat.jpg"]}
    {"text_list": ["A cat"], "image_info": [{"image_name": "cat.jpg", "matched_text_index": 0}]}
    {"parts": [{"text": "A cat"}, {"image": "cat.jpg"}, {"sound": [0.1, 0.2]}]}

The second is that of OBELICS (Laurençon et al. 2023, arXiv:2306.16527), the third that of MMC4
(Zhu et al. 2023, arXiv:2304.06939), where an image goes right before its text. The last holds
any modality, by its name in `model.modalities`: an image is the name of its file, others are what
they read.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_mm.data.checked_json import Node
from unified_mm.data.listing import Entry
from unified_mm.data.manifest import Stats, image_faults, problem_counts, refuse_bad
from unified_mm.data.records import Problem, Text
from unified_mm.files import naming, parse_json, user_path

MARKER = "<image>"  # where an image lies in the text of the first form


@dataclass(frozen=True)
class Item:
    """What a modality reads of a document at one place.

    Attributes:
      modality: its name.
      part: as in `Record.parts`: of an image the absolute path of its file, or where it is stored.
    """

    modality: str
    part: Any


Part = Item | Text


@dataclass(frozen=True)
class Document:
    """Items and texts in reading order."""

    id: int | str
    parts: tuple[Part, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(part for part in self.parts if isinstance(part, Item))

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(part for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class DocumentSet:
    """The validated documents of a file, in its order, with the problems that were found.

    Attributes:
      fingerprint: SHA-256 over what training sees: ids, texts, and in their places among the
        texts the images' sizes in bytes and what other modalities read.
    """

    documents: tuple[Document, ...]
    problems: tuple[Problem, ...]
    fingerprint: str
    path: str


def read_documents(
    path: str | os.PathLike,
    modalities: Mapping[str, Any],
    *,
    max_bad_share: float,
    threads: int | None = None,
    progress: bool = True,
) -> DocumentSet:
    """Reads the documents of a JSON-lines file and decodes every image completely once.

    An image's path is relative to the file's folder, or else to `images/` in it. Texts are
    stripped of outer spaces, empty ones are dropped, and neighbouring ones stay separate. A
    document without "id" gets the number of its line. Documents of which an image is missing or
    unreadable, or an item is bad by its modality's `fault`, and documents without text, are left
    out and counted. Blank lines are skipped.

    Args:
      path: the JSON-lines file.
      modalities: what the model reads, by name.
      max_bad_share: the largest share of documents that may be left out.
      threads: threads that decode images; as many as the machine has cores by default.
      progress: whether to show a progress bar on a terminal.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is malformed or holds a modality that is not read (with file and line), the
        file holds no document, more than
        `max_bad_share` of the documents are left out, or none remains.
    """
    path = user_path(path, "data.documents.file").absolute()
    listed = list(_lines(path))
    if not listed:
        raise ValueError(f"{path} holds no document: give a file of JSON lines, one a document")
    for place, document in listed:
        if unread := [each.modality for each in document.items if each.modality not in modalities]:
            raise ValueError(
                f"{place}: holds {unread[0]}, and the model reads {', '.join(modalities)}"
            )
    names = dict.fromkeys(name for _, document in listed for name in _image_names(document))
    files = {name: _locate(path.parent, name) for name in names}
    stats = {file: file.stat() for file in files.values() if os.path.isfile(file)}
    faults = _image_faults(files, stats, threads, progress)
    kept, problems = [], []
    for place, document in listed:
        fault = _fault(place, document, faults, modalities)
        if fault:
            problems.append(fault)
        else:
            kept.append(document)
    refuse_bad(f"documents of {path}", len(listed), len(kept), problems, max_bad_share)
    used = {name for document in kept for name in _image_names(document)}
    problems += [fault for name, fault in faults.items() if name in used]  # the conversions
    fingerprint = _fingerprint(kept, {name: stats[files[name]].st_size for name in used})
    documents = tuple(_located(document, files) for document in kept)
    return DocumentSet(documents, tuple(problems), fingerprint, str(path))


def summary(documents: DocumentSet) -> str:
    """Returns one paragraph for people: counts, and every kind of problem with its places."""
    members = documents.documents
    found = Counter(item.modality for document in members for item in document.items)
    others = "".join(f", {found[name]:,} {name}s" for name in sorted(found) if name != "image")
    texts = sum(len(document.texts) for document in members)
    parts = [
        f"{len(members):,} documents with {found['image']:,} images{others} and "
        f"{texts:,} texts from {documents.path}"
    ]
    bare = sum(not document.items for document in members)
    parts += [f"{bare:,} without image"] if bare else []
    return "; ".join(parts + problem_counts(documents.problems)) + "."


def _lines(path: Path) -> Iterator[tuple[str, Document]]:
    """Yields the place of each document, such as pages.jsonl:7, and the document.

    Its images have the names that the file gives them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is malformed.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no documents at {path}: give a file of JSON lines, one document a line"
        )
    with naming(f"data.documents.file={path}"), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{path}:{number}"
                yield f"{path.name}:{number}", _document(_node(place, line), number)


def _node(place: str, line: bytes) -> Node:
    """Returns the value on a line; errors begin with `place`, the file and the line number."""
    try:
        value = parse_json(line.rstrip(), place)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(f"{place}: is nested too deeply to be read") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: holds half of a surrogate pair, which is no text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON at column {error.colno}: {error.msg}") from error
    return Node(Path(place), "document", value)


def _document(node: Node, number: int) -> Document:
    key = node.id("id") if node.has("id") else number
    forms = [form for form in _FORMS if form in node.value]
    if len(forms) != 1:
        raise node.error(
            f"has {' and '.join(forms) or 'no texts'}: exactly one of {', '.join(_FORMS)} says "
            "which form it has"
        )
    parts = _FORMS[forms[0]](node)
    return Document(key, tuple(part for part in parts if part != Text("", "")))


def _with_markers(node: Node) -> list[Part]:
    first, *pieces = node.string("text").split(MARKER)
    names = [_name(item) for item in node.items("images")] if node.has("images") else []
    if len(pieces) != len(names):
        counts = f"holds {len(pieces)} {MARKER}, but images lists {len(names)}"
        raise node.error(f"{counts}: the n-th {MARKER} is the n-th of images", "text")
    parts: list[Part] = [_text(first)]
    for name, piece in zip(names, pieces, strict=True):
        parts += [Item("image", name), _text(piece)]
    return parts


def _side_by_side(node: Node) -> list[Part]:
    texts, names = node.items("texts"), node.items("images")
    if len(texts) != len(names):
        raise node.error(f"has {len(texts)} members, but images has {len(names)}", "texts")
    parts: list[Part] = []
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        if (text.value is None) == (name.value is None):
            both = "both null" if text.value is None else "both given"
            raise text.error(f"and images[{i}] are {both}: exactly one must be null")
        parts.append(_plain(text) if name.value is None else Item("image", _name(name)))
    return parts


def _matched(node: Node) -> list[Part]:
    texts = [_plain(item) for item in node.items("text_list")]
    before: list[list[Part]] = [[] for _ in texts]
    for item in node.items("image_info"):
        name = Item("image", _name(item, "image_name"))
        before[_index(item, "matched_text_index", len(texts))].append(name)
    return [part for group, text in zip(before, texts, strict=True) for part in (*group, text)]


def _by_name(node: Node) -> list[Part]:
    parts: list[Part] = []
    for item in node.items("parts"):
        if not isinstance(item.value, dict) or len(item.value) != 1:
            raise item.error("must have one key, the name of a modality or 'text'")
        (name,) = item.value
        if name == "text":
            parts.append(_text(_string(item.value[name], item, name)))
        else:
            part = _name(item, name) if name == "image" else item.value[name]
            parts.append(Item(name, part))
    return parts


_FORMS = {
    "text": _with_markers,
    "texts": _side_by_side,
    "text_list": _matched,
    "parts": _by_name,
}


def _text(target: str) -> Text:
    return Text(prompt="", target=target.strip())


def _plain(item: Node) -> Text:
    """Returns a text that must not contain an image marker."""
    text = _string(item.value, item)
    if MARKER in text:
        raise item.error(f"holds {MARKER}, but a text has no image of its own in this form")
    return _text(text)


def _name(item: Node, key: str = "") -> str:
    name = _string(item.get(key) if key else item.value, item, key)
    if not name.strip():
        raise item.error("is empty, must name an image file", key)
    return name


def _string(value: object, item: Node, key: str = "") -> str:
    if not isinstance(value, str):
        raise item.error(f"must be a string, is {json.dumps(value):.40}", key)
    return value


def _index(item: Node, key: str, count: int) -> int:
    index = item.get(key)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        shown = f"{json.dumps(index):.40}"
        raise item.error(f"must be the number of one of {count} texts, from 0, is {shown}", key)
    return index


def _locate(folder: Path, name: str) -> Path:
    places = (folder / name, folder / "images" / name)
    # os.path says no to what can be no name (a URL with the image in it), where Path raises.
    return next((place for place in places if os.path.isfile(place)), places[0])


def _image_faults(
    files: dict[str, Path], stats: Stats, threads: int | None, progress: bool
) -> dict[str, Problem]:
    """Returns the problems of images, by the images' names; good images have no entry."""
    entries = [Entry(name, name, file, ()) for name, file in files.items()]
    faults = zip(files, image_faults(entries, stats, threads, progress), strict=True)
    return {name: fault for name, fault in faults if fault}


def _image_names(document: Document) -> list[str]:
    return [item.part for item in document.items if item.modality == "image"]


def _fault(
    place: str, document: Document, faults: dict[str, Problem], modalities: Mapping[str, Any]
) -> Problem | None:
    """Returns the first problem for which a document is left out, or None for one that is kept."""
    if not document.texts:
        return Problem(place, "no text", "left out")
    for item in document.items:
        if item.modality == "image":
            fault = faults.get(item.part)
            if fault and fault.action == "left out":
                return dataclasses.replace(fault, file=f"{place}: {fault.file}")
        elif what := getattr(modalities[item.modality], "fault", lambda part: "")(item.part):
            return Problem(f"{place}: {item.modality}", what, "left out")
    return None


def _fingerprint(documents: list[Document], sizes: dict[str, int]) -> str:
    digest = hashlib.sha256()

    def seen(part: Part) -> Any:
        if isinstance(part, Text):
            return [part.prompt, part.target]
        return sizes[part.part] if part.modality == "image" else {part.modality: part.part}

    for document in documents:
        parts = [seen(part) for part in document.parts]
        digest.update(json.dumps([document.id, parts]).encode())
    return digest.hexdigest()


def _located(document: Document, files: dict[str, Path]) -> Document:
    def located(part: Part) -> Part:
        if isinstance(part, Item) and part.modality == "image":
            return Item("image", str(files[part.part]))
        return part

    return dataclasses.replace(document, parts=tuple(map(located, document.parts)))
