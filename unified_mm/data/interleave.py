"""Interleaved documents as rows of a batch: packing, layout, and few-shot documents.

In a sequence the slots of all modalities come first and then all text tokens, as everywhere in this
package; the order in the documents is in `position` and `segment` (Alayrac et al. 2022,
arXiv:2204.14198, section 2.3, for text that attends to the latest image before it).
"""

import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import le, sub
from typing import Any, NamedTuple

import numpy as np

from unified_mm.data.documents import Document, Item
from unified_mm.data.manifest import names_sides
from unified_mm.data.records import Record, Text
from unified_mm.data.text_tokenizer import TextTokenizer

_TRIED = 64  # rows that packing tries before it begins another
NO_DOCUMENT = -1  # of unused slots and tokens, so that they match no used ones
_TIMES = 5  # few-shot rows a record, each with other examples before it


@dataclass(frozen=True)
class Row:
    """One or more documents that share a row of a batch.

    Attributes:
      documents: the documents, in order.
      directional: whether flipping the images could make a text false although none says left or
        right, as `Record.mirrorable` tells.
    """

    documents: tuple[Document, ...]
    directional: bool = False

    @cached_property
    def mirrorable(self) -> bool:
        """Returns whether the images may be flipped: not if any text names a side."""
        named = any(names_sides(document.texts) for document in self.documents)
        return not self.directional and not named


class PlacedItem(NamedTuple):
    """An item in a slot of its modality.

    Attributes:
      part: what the modality reads.
      position: how many text tokens and items come before it in its document.
      segment: its number among the items of its document, from 1.
      document: the number of its document in the row, from 0.
    """

    part: Any
    position: int
    segment: int
    document: int


class PlacedToken(NamedTuple):
    """A text token in the row.

    Attributes:
      id: the token id.
      scored: whether the token is one that a model is asked to predict.
      place: how many text tokens come before it in its document.
      position: how many text tokens and items come before it in its document.
      segment: how many items come before it in its document.
      document: the number of its document in the row, from 0.
    """

    id: int
    scored: bool
    place: int
    position: int
    segment: int
    document: int


@dataclass(frozen=True)
class Layout:
    """The sizes of a row, which turn documents into placed items and tokens.

    Attributes:
      slots: items of each modality in a row.
      length: text tokens in a row.

    Raises:
      ValueError: one of them is below 1.
    """

    slots: int
    length: int

    def __post_init__(self):
        if self.slots < 1 or self.length < 1:
            raise ValueError(
                f"a layout of {self.slots} slots and {self.length} text tokens: a row needs at "
                "least one of each"
            )

    def fill(
        self, row: Row, tokenizer: TextTokenizer
    ) -> tuple[dict[str, list[PlacedItem]], list[PlacedToken]]:
        """Returns the items by modality and the text tokens of a row, in order.

        There are at most `slots` items of each modality and `length` tokens. What does not fit is
        cut: a text at the end of the row (it has no `<eos>` then), an item beyond the slots, and in
        either case everything that follows in the same document, so that no text speaks of an item
        that is not there. Later documents of the row get the remaining room.
        """
        items: dict[str, list[PlacedItem]] = {}
        tokens: list[PlacedToken] = []
        for number, document in enumerate(row.documents):
            self._fill_in(number, document, tokenizer, items, tokens)
        return items, tokens

    def _fill_in(
        self, number: int, document: Document, tokenizer: TextTokenizer,
        items: dict[str, list[PlacedItem]], tokens: list[PlacedToken],
    ) -> None:  # fmt: skip
        """Appends a document's items and tokens until one does not fit."""
        shown = written = 0  # of this document
        for part in document.parts:
            if isinstance(part, Item):
                placed = items.setdefault(part.modality, [])
                if len(placed) == self.slots:
                    return
                placed.append(PlacedItem(part.part, shown + written, shown + 1, number))
                shown += 1
                continue
            for id, scored in _encoded(part, tokenizer):
                if len(tokens) == self.length:
                    return
                token = PlacedToken(id, scored, written, shown + written, shown, number)
                tokens.append(token)
                written += 1


def text_length(document: Document, tokenizer: TextTokenizer) -> int:
    """Returns the number of text tokens of a document, `<bos>` and `<eos>` included."""
    return sum(len(_encoded(text, tokenizer)) for text in document.texts)


@dataclass
class _Begun:
    """A row that is being packed, with the room that is left of each kind."""

    members: list[int]
    room: tuple[int, ...]


def pack(
    lengths: Sequence[tuple[int, ...]], room: tuple[int, ...], seed: int
) -> list[tuple[int, ...]]:
    """Assigns every document to one row, as a function of the arguments alone.

    This is first fit over the 64 rows begun last, so the time is linear in the number of documents.
    A document that is too large for any row gets one of its own, where it is cut.

    Args:
      lengths: what each document takes of each kind of room, such as images and tokens.
      room: how much a row has of each.
      seed: draws the order in which documents are packed.

    Returns:
      The indices of the documents of each row.
    """
    rows: list[_Begun] = []
    tried: deque[_Begun] = deque(maxlen=_TRIED)  # beyond that, the earliest falls out
    for i in _draws(seed, b"packing", 0).permutation(len(lengths)).tolist():
        taken = lengths[i]
        fits = (r for r in tried if all(map(le, taken, r.room)))
        row = next(fits, None)
        if row is None:
            row = _Begun([], room)
            rows.append(row)
            tried.append(row)
        row.members.append(i)
        # Below zero after what is too large: then nothing more fits.
        row.room = tuple(map(sub, row.room, taken))
    return [tuple(row.members) for row in rows]


def packed_rows(
    documents: Sequence[Document], tokenizer: TextTokenizer, layout: Layout, seed: int
) -> list[Row]:
    """Returns the documents as rows, put together by `pack`."""
    names = sorted({item.modality for document in documents for item in document.items})
    lengths = []
    for document in documents:
        found = Counter(item.modality for item in document.items)
        lengths.append((*(found[name] for name in names), text_length(document, tokenizer)))
    packed = pack(lengths, (*[layout.slots] * len(names), layout.length), seed)
    return [Row(tuple(documents[i] for i in members)) for members in packed]


class FewShotRows(Sequence[Row]):
    """Records as few-shot documents: other examples with their texts, then the record's own.

    A record is usable if it has a part of these modalities and a text of the kind that `questions`
    asks for. From n usable records there are 5n rows, and row j ends with record j % n. The other
    records (without replacement) and which text of each record are drawn by Philox from (seed, j)
    alone.

    Args:
      records: the records of a split.
      shots: how many other examples come before a record's own.
      seed: seed of the draws.
      questions: whether the texts are questions (texts with a prompt) rather than captions.
      of: the modalities whose parts are shown.

    Raises:
      ValueError: `shots` is negative, or fewer than `shots` + 1 records are usable.
    """

    def __init__(
        self,
        records: Sequence[Record],
        shots: int,
        seed: int,
        *,
        questions: bool = False,
        of: Sequence[str] = ("image",),
    ):
        found = (_example(record, questions, of) for record in records)
        self._examples = [example for example in found if example is not None]
        self._shots = shots
        self._seed = seed
        if shots < 0 or len(self._examples) <= shots:
            kind = "a question" if questions else "a caption"
            raise ValueError(
                f"{shots} shots need at least {shots + 1} records with {' or '.join(of)} and "
                f"{kind}, of {len(records)} there are {len(self._examples)}: ask for from 0 to "
                f"{len(self._examples) - 1} shots"
            )

    def __len__(self) -> int:
        return _TIMES * len(self._examples)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} few-shot rows")
        own = index % len(self._examples)
        rng = _draws(self._seed, b"few shots", index)
        others = rng.choice(len(self._examples) - 1, self._shots, replace=False)
        chosen = [self._examples[other + (other >= own)] for other in others]
        chosen.append(self._examples[own])
        parts = [
            part
            for example in chosen
            for part in (*example.items, example.texts[rng.integers(len(example.texts))])
        ]
        document = Document(chosen[-1].id, tuple(parts))
        return Row((document,), directional=not all(example.mirrorable for example in chosen))


class _Example(NamedTuple):
    id: int | str
    items: tuple[Item, ...]
    texts: tuple[Text, ...]
    mirrorable: bool


def _example(record: Record, questions: bool, of: Sequence[str]) -> _Example | None:
    texts = tuple(text for text in record.texts if bool(text.prompt) == questions)
    items = tuple(Item(name, record.parts[name]) for name in of if name in record.parts)
    return _Example(record.id, items, texts, record.mirrorable) if items and texts else None


def _encoded(text: Text, tokenizer: TextTokenizer) -> list[tuple[int, bool]]:
    """Returns the tokens of `<bos> prompt target <eos>`, uncut, and whether each is scored."""
    prompt = tokenizer.encode_prompt(text.prompt)
    target = [*tokenizer.target_ids(text.prompt, text.target), tokenizer.eos_id]
    return [(id, False) for id in prompt] + [(id, True) for id in target]


def _draws(seed: int, stream: bytes, number: int) -> np.random.Generator:
    # Streams are kept apart as the pipeline's are: by the key, and the counter's highest word.
    key = np.array([seed, zlib.crc32(stream)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
