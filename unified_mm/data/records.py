"""What every data source hands on: records (one image and its texts) in a validated manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Text:
    """One text of a record. A caption has the prompt ''; an answer has its question as prompt."""

    prompt: str
    target: str


@runtime_checkable
class ByteStore(Protocol):
    """Undecoded images in larger files, by number; it pickles, and threads share it."""

    def __getitem__(self, number: int, /) -> bytes: ...


@dataclass(frozen=True)
class StoredImage:
    """An image that lies in a larger file beside others; `str` of it names it in messages.

    `name` is its file name as far as known, `size` is in bytes.
    """

    shelf: ByteStore
    number: int
    name: str
    size: int

    def read(self) -> bytes:
        """The undecoded bytes. Raises ValueError naming what cannot be read."""
        return self.shelf[self.number]

    def __str__(self) -> str:
        return f"{self.shelf}[{self.number}] ({self.name})"


Image = str | StoredImage  # a file's absolute path, or what lies in a larger file


@dataclass(frozen=True)
class Record:
    """One example: an image, its texts, and what further modalities need.

    `image` is None where the example has no image; `texts` may be empty;
    `mirrorable` is False where flipping left and right would make a text false; `fields` holds,
    by name, plain JSON values for modalities other than image and text.
    """

    id: int | str
    image: Image | None
    texts: tuple[Text, ...]
    mirrorable: bool
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something found while reading: `file` says where, `what` says which fault.

    `action` is 'converted' where the example is used all the same, else 'left out'.
    """

    file: str
    what: str
    action: str


@dataclass(frozen=True)
class Manifest:
    """The validated examples of one split, in a fixed order, with the faults that were found.

    `source` is 'coco', 'world' or another data source's name. `fingerprint` is a SHA-256 over
    what training sees: ids, texts and the images' sizes in bytes; two manifests with equal
    fingerprints train alike.
    """

    split: str
    records: tuple[Record, ...]
    source: str
    folder: str
    fingerprint: str
    problems: tuple[Problem, ...] = ()
