"""Makes a search index of items in files: see `search_index` for its own files.

While it is made, `.NAME.indexing` lies beside the folder that is wanted: plan.json, and a shard for
each so many items, with their vectors, those of their captions, and what was wrong. A shard takes
its name when it is on disk, and the index takes its own name last: what has its name is complete,
and a command that was killed goes on with the first shard that is missing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unified_mm.data.manifest import problem_counts
from unified_mm.data.records import Problem
from unified_mm.files import hold, naming, read_json, write_atomically, write_json
from unified_mm.inference.classes import check_finite
from unified_mm.inference.loaded import LoadedModel, Row, problems_of
from unified_mm.search.items import ItemSet, refuse_without_contrast, shown
from unified_mm.search.nearest import EXACT_UP_TO, write_vectors
from unified_mm.search.search_index import (
    Rows,
    model_identity,
    read_header,
    work_folder,
    write_metadata,
)

SHARD = 256  # items
_PLAN = "plan.json"
# What a plan's keys are called to a user who has changed one.
_CALLED = {
    "model": "run or checkpoint",
    "of": "--of",
    "objective": "--objective",
    "folder": "folder",
    "splits": "split",
    "pictures": "state of the {items} or captions (some were added, removed or changed)",
    "shard": "--shard",
    "exact_up_to": "--exact_up_to",
}


@dataclass(frozen=True)
class Shard:
    """Some items of a set with their captions, embedded; its fields are the arrays of its file.

    Attributes:
      images: float32 [kept, Z], of the items that can be read.
      kept: int64 [kept], their numbers in the set.
      texts: float32 [texts, Z], of their captions, item by item.
      problems: uint8, as JSON one for each item that was left out.
    """

    images: np.ndarray
    kept: np.ndarray
    texts: np.ndarray
    problems: np.ndarray

    def read_problems(self) -> list[Problem]:
        """Returns the problems."""
        return [Problem(*each) for each in json.loads(self.problems.tobytes())]


def write_index(
    model: LoadedModel,
    items: ItemSet,
    out: Path,
    say: Callable[[str], None],
    *,
    objective: str = "",
    shard: int = SHARD,
    exact_up_to: int = EXACT_UP_TO,
) -> None:
    """Embeds all items with their captions and writes the index; goes on where it can.

    Items that cannot be read are left out, with their captions, and reported.

    Args:
      model: the loaded model.
      items: of a modality that the model embeds.
      out: the index's folder; nothing that is there is changed.
      say: takes a line about what was done.
      objective: the contrastive objective in whose space they lie; by default that of the modality
        and texts.
      shard: items embedded between two writes.
      exact_up_to: vectors of a kind; more get a graph (see `nearest`).

    Raises:
      ValueError: `out` holds something else, or a beginning of it was made of other items or with
        another model; no item can be read; embeddings that are not finite; a model without
        contrast of the modality; a path that cannot be written; another process is at work on it.
    """
    if not model.predictor.task.contrasts(items.of):
        refuse_without_contrast(model, "search", "search", items.of)
    space = model.predictor.task.space_of(items.of, objective)
    if "text" not in space.between and any(items.captions):
        say(f"captions are left out: {space.name} compares {', '.join(space.between)}")
        items = replace(items, captions=((),) * len(items.names))
    plan = {
        "model": model_identity(model),
        "of": items.of,
        "objective": space.name,
        "folder": str(items.folder),
        "splits": list(items.splits),
        "pictures": items.fingerprint(),
        "shard": shard,
        "exact_up_to": exact_up_to,
    }
    work = work_folder(out)
    if os.path.lexists(out):
        found = read_header(out)
        if not found:
            raise ValueError(
                f"{out} exists and is no index: name a new one, for it is not overwritten"
            )
        _refuse_other(out, found, plan, items, "name a new one, for it is not overwritten")
        say(f"the index {out} is made already, of the same {items.noun} with the same model")
        shutil.rmtree(work, ignore_errors=True)
        return
    with naming(f"--out={out}"), hold(work):
        if (work / _PLAN).is_file():
            found = read_json(work / _PLAN)
            _refuse_other(work, found, plan, items, "delete it, or ask as before")
        else:
            write_json(work / _PLAN, plan)
        _embed_missing(model, items, work, plan, say)
        _finish(work, out, items, plan, model.state, say)


def progress(out: Path) -> str:
    """Returns how many shards of an unfinished index are complete, as a sentence for the user."""
    work = work_folder(out)
    return f"{sum(1 for _ in work.glob('shard-*.npz'))} shards are whole in {work}"


def _refuse_other(
    folder: Path, found: dict[str, Any], plan: dict[str, Any], items: ItemSet, advice: str
) -> None:
    """Raises ValueError unless what is found holds all that is planned."""
    # Earlier versions indexed images alone, and did not say in which space.
    found = {"of": "image", "objective": plan["objective"], **found}
    other = [_CALLED[key].format(items=items.noun) for key in plan if found.get(key) != plan[key]]
    if other:
        raise ValueError(f"{folder} is of another {', of another '.join(other)}: {advice}")


def _embed_missing(
    model: LoadedModel, items: ItemSet, work: Path, plan: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Writes the shards that are missing or damaged, in order."""
    from tqdm import tqdm

    total, size = len(items.names), plan["shard"]
    shards = {
        work / f"shard-{place:07}.npz": range(start, min(start + size, total))
        for place, start in enumerate(range(0, total, size))
    }
    damaged = [path for path in shards if path.exists() and read_shard(path) is None]
    missing = {p: part for p, part in shards.items() if p in damaged or not p.exists()}
    if damaged:
        say(f"damaged, embedded again: {', '.join(path.name for path in damaged)}")
    if len(missing) < len(shards):
        say(f"going on in {work}: {len(shards) - len(missing)} of {len(shards)} shards are whole")
    done = total - sum(map(len, missing.values()))
    files = [[items.folder / items.names[i] for i in part] for part in missing.values()]
    read = model.read_ahead(files, items.of)
    with tqdm(total=total, initial=done, desc="embedding", unit="item", disable=None) as bar:
        for (path, part), rows in zip(missing.items(), read, strict=True):
            write_shard(path, embed_shard(model, items, part, rows, plan["objective"]))
            bar.update(len(part))


def embed_shard(
    model: LoadedModel, items: ItemSet, numbers: range, rows: Sequence[Row | str], objective: str
) -> Shard:
    """Returns the shard of the items with these numbers.

    Args:
      model: the loaded model.
      items: of which they are.
      numbers: theirs.
      rows: for each item, what the model reads of it, or a text that says what is wrong.
      objective: the contrastive objective in whose space they lie.
    """
    rows = [
        f"missing {items.of}" if items.stats[number] is None else row
        for number, row in zip(numbers, rows, strict=True)
    ]
    names = [shown(items.names[number]) for number in numbers]
    good, vectors = model.embed_readable(rows, items.of, objective)
    check_finite(vectors, [names[i] for i in good])
    kept = [numbers[i] for i in good]
    texts = [text for number in kept for text in items.captions[number]]
    embedded = model.embed(texts, "text", objective) if texts else vectors[:0]
    check_finite(embedded, texts)
    problems = json.dumps([astuple(each) for each in problems_of(names, rows)]).encode()
    return Shard(vectors, np.array(kept, np.int64), embedded, np.frombuffer(problems, np.uint8))


def write_shard(path: Path, shard: Shard) -> None:
    content = io.BytesIO()
    np.savez(content, **vars(shard))
    write_atomically(path, content.getvalue())


def read_shard(path: Path) -> Shard | None:
    """Reads a shard, checked by the CRC-32 of each of its parts; returns None for a damaged one."""
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content)) as parts:
            return Shard(**parts)
    except Exception:  # parsers raise whatever they meet in damaged bytes
        return None


def _finish(
    work: Path,
    out: Path,
    items: ItemSet,
    plan: dict[str, Any],
    state: str,
    say: Callable[[str], None],
) -> None:
    """Joins all shards into one index, which takes its own name once it is complete."""
    whole = work / "index"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    paths = sorted(work.glob("shard-*.npz"))
    kept: list[int] = []
    problems = list(items.problems)
    for shard in _shards(paths):
        kept += shard.kept.tolist()
        problems += shard.read_problems()
        width = shard.images.shape[1]
    for phrase in problem_counts(problems):
        say(phrase)
    if not kept:
        raise ValueError(f"none of the {len(items.names):,} {items.noun} can be read")
    captions = [items.captions[number] for number in kept]
    rows = Rows(
        names=[items.names[number] for number in kept],
        sizes=[(items.stats[number] or (0, 0))[0] for number in kept],
        texts=[text for texts in captions for text in texts],
        owners=[row for row, texts in enumerate(captions) for _ in texts],
    )
    for kind, part, count in ((items.of, "images", len(kept)), ("text", "texts", len(rows.texts))):
        if count:
            parts = (getattr(shard, part) for shard in _shards(paths))
            exact = plan["exact_up_to"]
            write_vectors(whole, kind, parts, (count, width), exact_up_to=exact)
    found = {"state": state, "problems": [asdict(problem) for problem in problems]}
    write_metadata(whole, {**plan, **found}, rows)
    os.rename(whole, out)
    shutil.rmtree(work)


def _shards(paths: Sequence[Path]) -> Iterator[Shard]:
    for path in paths:
        shard = read_shard(path)
        if shard is None:
            raise ValueError(f"{path} was damaged meanwhile: the same command embeds it again")
        yield shard
