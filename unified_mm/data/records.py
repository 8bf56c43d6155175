"""Records (examples: their parts by modality) in a validated manifest, as every source gives."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# Scripts that set no space between words: Thai, Lao, Tibetan, Burmese, Khmer, Kana, Bopomofo, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3105-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Text:
    """One text of a record.

    Attributes:
      prompt: the question of an answer, '' for a caption.
      target: the caption or the answer.
    """

    prompt: str
    target: str


@runtime_checkable
class ByteStore(Protocol):
    """A store of files inside of larger ones, by number; it pickles, and threads share it."""

    def __getitem__(self, number: int, /) -> bytes: ...


@dataclass(frozen=True)
class Stored:
    """A file that lies in a larger one beside others; its `str` names it in messages.

    Attributes:
      shelf: the store that holds it.
      number: its number in the store.
      name: its file name as far as known.
      size: in bytes.
    """

    shelf: ByteStore
    number: int
    name: str
    size: int

    def read(self) -> bytes:
        """Returns the bytes of the file.

        Raises:
          ValueError: the store cannot be read; the message names the file.
        """
        return self.shelf[self.number]

    def __str__(self) -> str:
        return f"{self.shelf}[{self.number}] ({self.name})"


StoredImage = Stored  # what it was called while images alone were stored
File = str | Stored  # a file's absolute path, or what lies in a larger file
Image = File
Source = str | os.PathLike | bytes | Stored  # a file, or what it holds


def content_of(file: str | os.PathLike | Stored) -> bytes:
    """Returns the bytes of a file, wherever it lies."""
    return file.read() if isinstance(file, Stored) else Path(file).read_bytes()


@dataclass(frozen=True)
class Record:
    """One example: its parts by modality, and its texts.

    Attributes:
      id: the example's id.
      parts: what modalities other than text read of the example, by their names: a `File`, or what
        else they take. A modality that the example lacks has no part.
      texts: may be empty.
      mirrorable: False where flipping left and right would make a text false.
      labels: the classes that it is of.
      foils: captions of it, each with the same made false, where training asks for them.
    """

    id: int | str
    parts: Mapping[str, Any]
    texts: tuple[Text, ...]
    mirrorable: bool
    labels: tuple[str, ...] = ()
    foils: tuple[tuple[str, str], ...] = ()

    @property
    def image(self) -> Image | None:
        """Returns the example's image, None where it has none."""
        found: Image | None = self.parts.get("image")
        return found

    def has(self, modality: str) -> bool:
        """Returns whether the example has a modality; a text is one without a prompt."""
        if modality == "text":
            return any(not text.prompt for text in self.texts)
        return modality in self.parts


@dataclass(frozen=True)
class Problem:
    """A fault found while reading.

    Attributes:
      file: where it is.
      what: the kind of fault.
      action: 'converted' where the example is used all the same, else 'left out'.
    """

    file: str
    what: str
    action: str


@dataclass(frozen=True)
class Manifest:
    """The validated examples of one split, in a fixed order, with the problems that were found.

    Attributes:
      split: the name of the split.
      records: the examples.
      source: the name of the data source, such as 'coco' or 'world'.
      folder: the data folder.
      fingerprint: SHA-256 over what training sees: ids, texts, labels and the files' sizes in
        bytes. Manifests with equal fingerprints train alike.
      problems: the faults that were found.
      unchecked: how many images were not decoded.
    """

    split: str
    records: tuple[Record, ...]
    source: str
    folder: str
    fingerprint: str
    problems: tuple[Problem, ...] = ()
    unchecked: int = 0
