"""Makes a search index of a folder of pictures or a COCO set: see `search_index` for its files.

While it is made, `.NAME.indexing` lies beside the folder that is wanted: plan.json, and a shard for
each so many pictures, with their vectors, those of their captions, and what was wrong. A shard
takes its name when it is on disk, and the index takes its own name last: what has its name is
complete, and a command that was killed goes on with the first shard that is missing.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unified_mm.data.manifest import problem_counts
from unified_mm.files import hold, naming, read_json, write_json
from unified_mm.inference.loaded import LoadedModel
from unified_mm.search.index_shards import (
    Shard,
    embed_shard,
    read_shard,
    views_of,
    write_shard,
)
from unified_mm.search.nearest import EXACT_UP_TO, write_vectors
from unified_mm.search.pictures import PictureSet, refuse_without_contrast
from unified_mm.search.search_index import (
    Rows,
    model_identity,
    read_header,
    work_folder,
    write_metadata,
)

SHARD = 256  # pictures
_PLAN = "plan.json"
# What a plan's keys are called to a user who has changed one.
_CALLED = {
    "model": "run or checkpoint",
    "folder": "folder",
    "splits": "split",
    "pictures": "state of the pictures or captions (some were added, removed or changed)",
    "shard": "--shard",
    "exact_up_to": "--exact_up_to",
}


def write_index(
    model: LoadedModel,
    pictures: PictureSet,
    out: Path,
    say: Callable[[str], None],
    *,
    shard: int = SHARD,
    exact_up_to: int = EXACT_UP_TO,
) -> None:
    """Embeds all pictures with their captions and writes the index; goes on where it can.

    Pictures that cannot be read are left out, with their captions, and reported.

    Args:
      out: the index's folder; nothing that is there is changed.
      say: takes a line about what was done.
      shard: pictures embedded between two writes.
      exact_up_to: vectors of a kind; more get a graph (see `nearest`).

    Raises:
      ValueError: `out` holds something else, or a beginning of it was made of other pictures or
        with another model; no picture can be read; embeddings that are not finite; a model without
        contrast of image and text; a path that cannot be written; another process is at work on it.
    """
    refuse_without_contrast(model, "search", "search")
    plan = {
        "model": model_identity(model),
        "folder": str(pictures.folder),
        "splits": list(pictures.splits),
        "pictures": pictures.fingerprint(),
        "shard": shard,
        "exact_up_to": exact_up_to,
    }
    work = work_folder(out)
    if os.path.lexists(out):
        _refuse_other(out, read_header(out), plan, "name a new one, for it is not overwritten")
        say(f"the index {out} is made already, of the same pictures with the same model")
        shutil.rmtree(work, ignore_errors=True)
        return
    with naming(f"--out={out}"), hold(work):
        _begin_or_go_on(work, plan)
        _embed_missing(model, pictures, work, shard, say)
        _finish(work, out, pictures, plan, model.state, say)


def progress(out: Path) -> str:
    """Returns how many shards of an unfinished index are complete, as a sentence for the user."""
    work = work_folder(out)
    return f"{sum(1 for _ in work.glob('shard-*.npz'))} shards are whole in {work}"


def _refuse_other(folder: Path, found: dict[str, Any], plan: dict[str, Any], advice: str) -> None:
    """Raises ValueError unless what is found holds all that is planned."""
    if not found:
        raise ValueError(f"{folder} exists and is no index: {advice}")
    other = [_CALLED[key] for key in plan if found.get(key) != plan[key]]
    if other:
        raise ValueError(f"{folder} is of another {', of another '.join(other)}: {advice}")


def _begin_or_go_on(work: Path, plan: dict[str, Any]) -> None:
    if (work / _PLAN).is_file():
        _refuse_other(work, read_json(work / _PLAN), plan, "delete it, or ask as before")
    else:
        write_json(work / _PLAN, plan)


def _embed_missing(
    model: LoadedModel, pictures: PictureSet, work: Path, shard: int, say: Callable[[str], None]
) -> None:
    """Writes the shards that are missing or damaged, in order."""
    from tqdm import tqdm

    numbers = range(len(pictures.names))
    shards = {
        _shard_path(work, place): numbers[start : start + shard]
        for place, start in enumerate(range(0, len(numbers), shard))
    }
    damaged = [path for path in shards if path.exists() and read_shard(path) is None]
    missing = [path for path in shards if path in damaged or not path.exists()]
    if damaged:
        say(f"damaged, embedded again: {', '.join(path.name for path in damaged)}")
    if len(missing) < len(shards):
        say(f"going on in {work}: {len(shards) - len(missing)} of {len(shards)} shards are whole")
    done = len(numbers) - sum(len(shards[path]) for path in missing)
    with (
        tqdm(
            total=len(numbers), initial=done, desc="embedding", unit="picture", disable=None
        ) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        parts = [shards[path] for path in missing]
        for path, part, views in zip(missing, parts, views_of(model, pictures, parts, pool)):
            write_shard(path, embed_shard(model, pictures, part, views))
            bar.update(len(part))


def _finish(
    work: Path,
    out: Path,
    pictures: PictureSet,
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
    problems = list(pictures.problems)
    for shard in _shards(paths):
        kept += shard.kept.tolist()
        problems += shard.problems
        width = shard.images.shape[1]
    for phrase in problem_counts(problems):
        say(phrase)
    if not kept:
        raise ValueError(f"none of the {len(pictures.names):,} pictures can be read")
    captions = [pictures.captions[number] for number in kept]
    rows = Rows(
        names=[pictures.names[number] for number in kept],
        sizes=[(pictures.stats[number] or (0, 0))[0] for number in kept],
        texts=[text for texts in captions for text in texts],
        owners=[row for row, texts in enumerate(captions) for _ in texts],
    )
    exact = plan["exact_up_to"]
    images = (shard.images for shard in _shards(paths))
    write_vectors(whole, "image", images, (len(kept), width), exact_up_to=exact)
    if rows.texts:
        texts = (shard.texts for shard in _shards(paths))
        write_vectors(whole, "text", texts, (len(rows.texts), width), exact_up_to=exact)
    found = {"state": state, "problems": [dataclasses.asdict(problem) for problem in problems]}
    write_metadata(whole, {**plan, **found}, rows)
    os.rename(whole, out)
    shutil.rmtree(work)


def _shards(paths: Sequence[Path]) -> Iterator[Shard]:
    for path in paths:
        shard = read_shard(path)
        if shard is None:
            raise ValueError(f"{path} was damaged meanwhile: the same command embeds it again")
        yield shard


def _shard_path(work: Path, place: int) -> Path:
    return work / f"shard-{place:07}.npz"
