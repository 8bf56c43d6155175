"""The validated manifest of a split: every file decoded once, the bad ones named."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL

from unified_mm.data import coco, images
from unified_mm.data.records import Manifest, Problem, Record, Text
from unified_mm.runs.folder import write_atomically

_FORMAT = 1  # raise it when the checks change: caches of an older format are not found then
_SIDES = re.compile(r"\b(left|right)(most|wards?)?\b", re.IGNORECASE)
_NAMED = 5  # files named per kind of problem in a summary


def build_manifest(
    folder: str | os.PathLike,
    split: str,
    *,
    source: str = "coco",
    cache: str | os.PathLike | None = None,
    max_bad_share: float = 0.05,
    threads: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Reads a split, decodes every image wholly, leaves out and names what is bad.

    With `cache`, the result is kept in `cache/manifests/` under a hash of the annotations and
    of each image's name, size and time of change, so unchanged data is decoded once. Raises
    as `coco.read_captions` does, and ValueError where more than `max_bad_share` of the listed
    images are left out or none remains.
    """
    folder = Path(folder).resolve()
    captions = coco.read_captions(folder, split)
    stats = _stat(captions)
    kept = _cache_file(cache, folder, split, source, captions, stats)
    if kept and kept.is_file():
        manifest = _from_cache(kept)
    else:
        manifest = _check(folder, split, source, captions, stats, threads, progress)
        if kept:
            write_atomically(kept, to_json(manifest).encode())
    _refuse_bad(manifest, captions.listed, max_bad_share)
    return manifest


def with_questions(manifest: Manifest, questions: Iterable[coco.Question]) -> Manifest:
    """The manifest with every question of its images as a further text of their records.

    A question that names sides makes its record not mirrorable. The fingerprint changes.
    """
    texts: dict[int | str, list[Text]] = {}
    for question in questions:
        texts.setdefault(question.image_id, []).append(question.text)
    records = tuple(_with_texts(r, texts.get(r.id, [])) for r in manifest.records)
    added = json.dumps(
        [[r.id, [dataclasses.astuple(t) for t in texts.get(r.id, [])]] for r in records]
    )
    fingerprint = hashlib.sha256((manifest.fingerprint + added).encode()).hexdigest()
    return dataclasses.replace(manifest, records=records, fingerprint=fingerprint)


def summary(manifest: Manifest) -> str:
    """One paragraph for people: what there is, and every kind of problem with its files."""
    records = manifest.records
    texts = sum(len(r.texts) for r in records)
    parts = [
        f"{manifest.source} {manifest.split}: {sum(r.image is not None for r in records):,} images "
        f"and {texts:,} texts in {len(records):,} examples from {manifest.folder}"
    ]
    counts = {
        "without image": sum(r.image is None for r in records),
        "without text": sum(not r.texts for r in records),
        "never mirrored": sum(not r.mirrorable for r in records),
    }
    parts += [f"{count:,} {name}" for name, count in counts.items() if count]
    kinds: dict[tuple[str, str], list[str]] = {}
    for problem in manifest.problems:
        kinds.setdefault((problem.action, problem.what), []).append(problem.file)
    for (action, what), files in sorted(kinds.items()):
        more = ", ..." if len(files) > _NAMED else ""
        parts.append(f"{action}: {len(files):,} x {what} ({', '.join(files[:_NAMED])}{more})")
    return "; ".join(parts) + "."


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text; `from_json` gives an equal one back."""
    return json.dumps(dataclasses.asdict(manifest), ensure_ascii=False)


def from_json(text: str) -> Manifest:
    """The manifest that `to_json` wrote. Raises ValueError, KeyError or TypeError otherwise."""
    data = json.loads(text)
    records = (
        Record(**{**r, "texts": tuple(Text(**t) for t in r["texts"])}) for r in data["records"]
    )
    problems = (Problem(**p) for p in data["problems"])
    return Manifest(**{**data, "records": tuple(records), "problems": tuple(problems)})


def _with_texts(record: Record, texts: list[Text]) -> Record:
    mirrorable = record.mirrorable and not _names_sides(texts)
    return dataclasses.replace(record, texts=(*record.texts, *texts), mirrorable=mirrorable)


def _names_sides(texts: Iterable[Text]) -> bool:
    return any(_SIDES.search(t.prompt) or _SIDES.search(t.target) for t in texts)


Stats = dict[Path, os.stat_result]


def _stat(captions: coco.Captions) -> Stats:
    """The files that are there, so that a missing one is one without an entry."""
    found = {}
    for entry in captions.entries:
        if entry.path is not None and entry.path.is_file():
            found[entry.path] = entry.path.stat()
    return found


def _check(
    folder: Path, split: str, source: str, captions: coco.Captions,
    stats: Stats, threads: int | None, progress: bool,
) -> Manifest:  # fmt: skip
    faults = _image_faults(captions.entries, stats, threads, progress)
    records = tuple(
        _record(entry, captions.directional)
        for entry, fault in zip(captions.entries, faults, strict=True)
        if fault is None or fault.action == "converted"
    )
    problems = tuple(fault for fault in faults if fault is not None) + captions.problems
    sizes = {str(path): stat.st_size for path, stat in stats.items()}
    return Manifest(split, records, source, str(folder), _fingerprint(records, sizes), problems)


def _image_faults(
    entries: tuple[coco.Entry, ...], stats: Stats, threads: int | None, progress: bool
) -> list[Problem | None]:
    from tqdm import tqdm

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        checks = pool.map(lambda entry: _image_fault(entry, stats), entries)
        disable = None if progress else True  # None: no bar where there is no terminal
        return list(tqdm(checks, "checking images", len(entries), unit="image", disable=disable))


def _image_fault(entry: coco.Entry, stats: Stats) -> Problem | None:
    if entry.path is None:
        return None
    name = str(entry.file)
    if entry.path not in stats:
        return Problem(name, "missing image", "left out")
    try:
        conversion = images.check(entry.path)
    except images.ImageError as error:
        return Problem(name, error.what, "left out")
    except OSError as error:
        return Problem(name, f"unreadable: {error.strerror}", "left out")
    return Problem(name, conversion, "converted") if conversion else None


def _record(entry: coco.Entry, directional: bool) -> Record:
    texts = tuple(Text(prompt="", target=caption) for caption in entry.captions)
    image = str(entry.path) if entry.path else None
    return Record(entry.id, image, texts, mirrorable=not directional and not _names_sides(texts))


def _fingerprint(records: tuple[Record, ...], sizes: dict[str, int]) -> str:
    digest = hashlib.sha256()
    for record in records:
        texts = [[text.prompt, text.target] for text in record.texts]
        size = sizes[record.image] if record.image else None
        digest.update(json.dumps([record.id, size, texts, record.mirrorable]).encode())
    return digest.hexdigest()


def _refuse_bad(manifest: Manifest, listed: int, max_bad_share: float) -> None:
    bad = listed - len(manifest.records)
    share = bad / max(listed, 1)
    if manifest.records and share <= max_bad_share:
        return
    # Faults of images come before those of captions.
    out = [f"{p.file} ({p.what})" for p in manifest.problems if p.action == "left out"]
    first = f", first {', '.join(out[: min(bad, 10)])}" if bad else ""
    raise ValueError(
        f"{bad} of the {listed} images of {manifest.split!r} in {manifest.folder} are bad "
        f"({share:.1%}, allowed are {max_bad_share:.1%}){first}. Mend or remove them, or raise "
        "data.max_bad_share"
    )


def _cache_file(
    cache: str | os.PathLike | None, folder: Path, split: str, source: str,
    captions: coco.Captions, stats: Stats,
) -> Path | None:  # fmt: skip
    if cache is None:
        return None
    digest = hashlib.sha256(captions.path.read_bytes())
    setting = [_FORMAT, PIL.__version__, str(folder), split, source]
    digest.update(json.dumps(setting).encode())
    for entry in captions.entries:
        stat = stats.get(entry.path) if entry.path else None
        digest.update(json.dumps([entry.file, stat and [stat.st_size, stat.st_mtime_ns]]).encode())
    return Path(cache) / "manifests" / f"{digest.hexdigest()}.json"


def _from_cache(path: Path) -> Manifest:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the cached manifest {path} is damaged ({error}): delete it") from error
