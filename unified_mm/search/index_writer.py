"""Makes a search index of items in files: see `search_index` for its own files.

While it is made, `.NAME.indexing` lies beside the folder that is wanted: plan.json, and a shard for
each so many items, with their vectors, those of their captions, and what was wrong. A shard takes
its name when it is on disk, and the index takes its own name last: what has its name is complete,
and a command that was killed goes on with the first shard that is missing.

The same command on a folder that has changed takes new and changed files into an index and forgets
those that are gone: only the former are embedded, and the new index takes the place of the old one
when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from unified_mm.data.manifest import problem_counts
from unified_mm.data.records import Problem
from unified_mm.files import hold, naming, read_json, write_atomically, write_json
from unified_mm.inference.classes import check_finite
from unified_mm.inference.loaded import LoadedModel, Windows, long_line, problems_of
from unified_mm.search.items import ItemSet, refuse_without_contrast, shown
from unified_mm.search.nearest import EXACT_UP_TO, write_vectors
from unified_mm.search.search_index import (
    Rows,
    SearchIndex,
    model_identity,
    read_header,
    replaced_folder,
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
      out: the index's folder; what is there is an index of the same folder, or nothing.
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
    work, replaced = work_folder(out), replaced_folder(out)
    if replaced.exists() and not os.path.lexists(out):
        os.rename(replaced, out)  # killed between the two names that a new index takes
    shutil.rmtree(replaced, ignore_errors=True)
    old: SearchIndex | None = None
    if os.path.lexists(out):
        found = read_header(out)
        if not found:
            raise ValueError(
                f"{out} exists and is no index: name a new one, for it is not overwritten"
            )
        asked = {key: value for key, value in plan.items() if key != "pictures"}
        _refuse_other(out, found, asked, items, "name a new one, for it is not overwritten")
        if found["pictures"] == plan["pictures"]:
            say(f"the index {out} is made already, of the same {items.noun} with the same model")
            shutil.rmtree(work, ignore_errors=True)
            return
        old = SearchIndex.open(out)
        if (work / _PLAN).is_file() and read_json(work / _PLAN) != plan:
            shutil.rmtree(work)  # of a state of the folder that is gone again
    kept = _unchanged(old, items) if old else {}
    with naming(f"--out={out}"), hold(work):
        if (work / _PLAN).is_file():
            found = read_json(work / _PLAN)
            _refuse_other(work, found, plan, items, "delete it, or ask as before")
        else:
            write_json(work / _PLAN, plan)
        new = [number for number in range(len(items.names)) if number not in kept]
        if old:
            gone = len(old.rows.names) - len(kept)
            say(
                f"{out} is brought up to date: {len(kept):,} {items.noun} stay, {len(new):,} are "
                f"new or changed, {gone:,} are changed or gone"
            )
        _embed_missing(model, items, new, work, plan, say)
        _finish(work, out, items, plan, model.state, old, kept, say)


def _unchanged(old: SearchIndex, items: ItemSet) -> dict[int, int]:
    """Returns the items whose vectors an index has, by number in the set: their numbers in it.

    They have the name, size, time of change and captions that they had. An index of an earlier
    version did not keep the times: there, what was changed before it was made counts.
    """
    made = (old.path / "index.json").stat().st_mtime_ns
    times = old.header.get("times") or [None] * len(old.rows.names)
    known = {name: number for number, name in enumerate(old.rows.names)}
    captions: list[list[str]] = [[] for _ in known]
    for text, owner in zip(old.rows.texts, old.rows.owners, strict=True):
        captions[owner].append(text)
    found = {}
    for number, (name, stat) in enumerate(zip(items.names, items.stats, strict=True)):
        place = known.get(name)
        if place is None or stat is None or list(items.captions[number]) != captions[place]:
            continue
        same_time = stat[1] < made if times[place] is None else stat[1] == times[place]
        if stat[0] == old.rows.sizes[place] and same_time:
            found[number] = place
    return found


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
    model: LoadedModel,
    items: ItemSet,
    numbers: Sequence[int],
    work: Path,
    plan: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Writes the shards of the items with these numbers that are missing or damaged, in order."""
    from tqdm import tqdm

    total, size = len(numbers), plan["shard"]
    shards = {
        work / f"shard-{place:07}.npz": numbers[start : start + size]
        for place, start in enumerate(range(0, total, size))
    }
    damaged = [path for path in shards if path.exists() and read_shard(path) is None]
    missing = {p: part for p, part in shards.items() if p in damaged or not p.exists()}
    if damaged:
        say(f"damaged, embedded again: {', '.join(path.name for path in damaged)}")
    if len(missing) < len(shards):
        say(f"going on in {work}: {len(shards) - len(missing)} of {len(shards)} shards are whole")
    if not missing:
        return
    done = total - sum(map(len, missing.values()))
    files = [[items.folder / items.names[i] for i in part] for part in missing.values()]
    read = model.read_ahead(files, items.of)
    windows: list[int] = []
    with tqdm(total=total, initial=done, desc="embedding", unit="item", disable=None) as bar:
        for (path, part), rows in zip(missing.items(), read, strict=True):
            write_shard(path, embed_shard(model, items, part, rows, plan["objective"]))
            windows += [len(row) for row in rows if not isinstance(row, str)]
            bar.update(len(part))
    if line := long_line(windows, items.of):
        say(line)


def embed_shard(
    model: LoadedModel,
    items: ItemSet,
    numbers: Sequence[int],
    rows: Sequence[Windows | str],
    objective: str,
) -> Shard:
    """Returns the shard of the items with these numbers.

    Args:
      model: the loaded model.
      items: of which they are.
      numbers: theirs.
      rows: for each item, the windows that the model reads of it, or what is wrong with it.
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
    old: SearchIndex | None,
    reused: dict[int, int],
    say: Callable[[str], None],
) -> None:
    """Joins what stays and all shards into one index, which takes its own name once it is whole.

    Args:
      work: where the shards lie.
      out: the index's folder.
      items: the items that it is of.
      plan: what it is made of.
      state: of the model: 'last' or 'best'.
      old: the index that was there, if any.
      reused: the items whose vectors that one has, as `_unchanged` gives them.
      say: takes a line about what was left out.
    """
    whole = work / "index"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    paths = sorted(work.glob("shard-*.npz"))
    kept = list(reused)
    problems = list(items.problems)
    width = old.nearest[items.of].vectors.shape[1] if old else 0
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
            before = (_vectors_of(old, kind, list(reused.values())),) if old else ()
            parts = chain(before, (getattr(shard, part) for shard in _shards(paths)))
            exact = plan["exact_up_to"]
            write_vectors(whole, kind, parts, (count, width), exact_up_to=exact)
    said = {
        "state": state,
        "problems": [asdict(problem) for problem in problems],
        "times": [(items.stats[number] or (0, 0))[1] for number in kept],
    }
    write_metadata(whole, {**plan, **said}, rows)
    if old:
        os.rename(out, replaced_folder(out))
    os.rename(whole, out)
    shutil.rmtree(work)
    shutil.rmtree(replaced_folder(out), ignore_errors=True)


def _vectors_of(old: SearchIndex, kind: str, numbers: Sequence[int]) -> np.ndarray:
    """Returns the vectors of an index's items with these numbers, or of their texts."""
    if kind not in old.nearest:
        return np.zeros((0, old.nearest[old.of].vectors.shape[1]), np.float32)
    vectors = old.nearest[kind].vectors
    if kind == old.of:
        return np.array(vectors[list(numbers)])
    texts: dict[int, list[int]] = {}
    for text, owner in enumerate(old.rows.owners):
        texts.setdefault(owner, []).append(text)
    return np.array(vectors[[text for number in numbers for text in texts.get(number, [])]])


def _shards(paths: Sequence[Path]) -> Iterator[Shard]:
    for path in paths:
        shard = read_shard(path)
        if shard is None:
            raise ValueError(f"{path} was damaged meanwhile: the same command embeds it again")
        yield shard
