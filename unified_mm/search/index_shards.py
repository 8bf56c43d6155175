"""Shards of a search index that is being made: some pictures with their captions, embedded."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unified_mm.data.records import Problem
from unified_mm.files import write_atomically
from unified_mm.inference.classes import check_finite
from unified_mm.inference.loaded import LoadedModel
from unified_mm.search.pictures import PictureSet, shown, view_or_fault


@dataclass(frozen=True)
class Shard:
    """Some pictures of a set with their captions, embedded.

    Attributes:
      images: float32 [kept, Z], of the pictures that can be read.
      kept: int64 [kept], their numbers in the set.
      texts: float32 [texts, Z], of their captions, picture by picture.
      problems: one for each picture that was left out.
    """

    images: np.ndarray
    kept: np.ndarray
    texts: np.ndarray
    problems: tuple[Problem, ...]


def views_of(
    model: LoadedModel,
    pictures: PictureSet,
    parts: Sequence[range],
    pool: ThreadPoolExecutor,
) -> Iterator[list[Any]]:
    """Yields the views or faults of each part's pictures; the next part is read meanwhile."""

    def view(number: int) -> Any:
        if pictures.stats[number] is None:
            return "missing image"
        return view_or_fault(model, pictures.folder / pictures.names[number])

    ahead: Iterator[Any] = iter(())
    for place, part in enumerate(parts):
        current = ahead if place else pool.map(view, part)
        ahead = pool.map(view, parts[place + 1]) if place + 1 < len(parts) else iter(())
        yield list(current)


def embed_shard(
    model: LoadedModel, pictures: PictureSet, numbers: range, views: Sequence[Any]
) -> Shard:
    """Returns the shard of the pictures with these numbers.

    Args:
      views: for each picture, what the model sees of it, or a text that says what is wrong.
    """
    good = [i for i, view in enumerate(views) if not isinstance(view, str)]
    kept = [numbers[i] for i in good]
    names = [shown(pictures.names[number]) for number in numbers]
    texts = [text for number in kept for text in pictures.captions[number]]
    images = model.embed_images([views[i] for i in good])
    check_finite(images, [names[i] for i in good])
    embedded = model.embed_texts(texts) if texts else images[:0]
    check_finite(embedded, texts)
    problems = tuple(
        Problem(name, view, "left out")
        for name, view in zip(names, views, strict=True)
        if isinstance(view, str)
    )
    return Shard(images, np.array(kept, np.int64), embedded, problems)


def write_shard(path: Path, shard: Shard) -> None:
    content = io.BytesIO()
    problems = json.dumps([astuple(problem) for problem in shard.problems]).encode()
    np.savez(
        content,
        images=shard.images,
        kept=shard.kept,
        texts=shard.texts,
        problems=np.frombuffer(problems, np.uint8),
    )
    write_atomically(path, content.getvalue())


def read_shard(path: Path) -> Shard | None:
    """Reads a shard, checked by the CRC-32 of each of its parts; returns None for a damaged one."""
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content)) as parts:
            problems = json.loads(parts["problems"].tobytes())
            return Shard(
                parts["images"],
                parts["kept"],
                parts["texts"],
                tuple(Problem(*problem) for problem in problems),
            )
    except Exception:  # parsers raise whatever they meet in damaged bytes
        return None
