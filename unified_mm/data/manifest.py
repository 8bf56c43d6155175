"""The validated manifest of a split: every file decoded once, the bad ones named."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL

from unified_mm.data import coco, images
from unified_mm.data.records import ByteStore, Image, Manifest, Problem, Record, StoredImage, Text
from unified_mm.files import naming, write_atomically

FORMAT = 2  # raise it when the checks change: caches of an older format are not found then
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
    sidecars: Sequence["Sidecar"] = (),
) -> Manifest:
    """Reads a split, decodes every image wholly, leaves out and names what is bad.

    With `cache`, the result is kept in `cache/manifests/` under a hash of the annotations and
    of each image's name, size and time of change, so unchanged data is decoded once. Raises
    as `coco.read_captions` does, and ValueError where more than `max_bad_share` of the listed
    images are left out, or of the captions, or of what lies `sidecars` them, or none remains; and
    where the cache cannot be written.
    """
    folder = Path(folder).resolve()
    captions = coco.read_captions(folder, split)
    stats = _stat(captions)
    manifest = cached(
        cache,
        _cache_key(folder, split, source, captions, stats),
        lambda: _check(folder, split, source, captions, stats, threads, progress),
    )
    # Faults of images come before those of captions.
    listed_as, remaining = f"images of {split!r} in {folder}", len(manifest.records)
    refuse_bad(listed_as, len(captions.listed), remaining, manifest.problems, max_bad_share)
    if captions.annotations:
        out = [each for each in captions.caption_problems if each.action == "left out"]
        listed_as = f"captions of {split!r} in {captions.path}"
        left = captions.annotations - len(out)
        refuse_bad(listed_as, captions.annotations, left, out, max_bad_share, captions.hint)
    return with_orphans(manifest, sidecars, captions.listed, captions.path)


def cached(
    cache: str | os.PathLike | None,
    key: str,
    make: Callable[[], Manifest],
    shelf: ByteStore | None = None,
) -> Manifest:
    """The manifest that `cache/manifests/` holds under a hash, else the one made now and kept.

    `shelf` holds the images that are in no files of their own. Raises ValueError for a damaged
    cache, and for one that cannot be written.
    """
    if cache is None:
        return make()
    path = Path(cache) / "manifests" / f"{key}.json"
    if os.path.isfile(path):
        return _from_cache(path, shelf)
    manifest = make()
    with naming(f"data.cache_dir={cache}"):
        write_atomically(path, to_json(manifest).encode())
    return manifest


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What lies beside a split's captions, each with the id of its image.

    `what` is "foil" or "question". Those on images that are not listed are counted; over
    `max_bad_share` of them, or all, are refused.
    """

    what: str
    image_ids: Sequence[coco.Key]
    max_bad_share: float

    def orphans(self, listed: Set[coco.Key], where: object) -> list[Problem]:
        """One for each that names no image listed in `where`. Raises ValueError for too many."""
        fault = f"{self.what} on an image that is not listed"
        found = [
            Problem(f"{self.what} {number}", fault, "left out")
            for number, image in enumerate(self.image_ids)
            if image not in listed
        ]
        if found:
            listed_as = f"{self.what}s beside {where}"
            left = len(self.image_ids) - len(found)
            hint = coco.id_hint(listed, self.image_ids)
            refuse_bad(listed_as, len(self.image_ids), left, found, self.max_bad_share, hint)
        return found


def with_orphans(
    manifest: Manifest, sidecars: Iterable[Sidecar], listed: Set[coco.Key], where: object
) -> Manifest:
    """The manifest, with what lies beside images that are not listed among its problems."""
    orphans = [each for members in sidecars for each in members.orphans(listed, where)]
    return dataclasses.replace(manifest, problems=(*manifest.problems, *orphans))


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
    return "; ".join(parts + problem_counts(manifest.problems)) + "."


def problem_counts(problems: Iterable[Problem]) -> list[str]:
    """A phrase for each kind of problem: how many there are, and the first of their files."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        kinds.setdefault((problem.action, problem.what), []).append(problem.file)
    phrases = []
    for (action, what), files in sorted(kinds.items()):
        more = ", ..." if len(files) > _NAMED else ""
        phrases.append(f"{action}: {len(files):,} x {what} ({', '.join(files[:_NAMED])}{more})")
    return phrases


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text; `from_json` gives an equal one back."""
    return json.dumps(manifest, default=_members)  # ASCII: paths need not be UTF-8


def _members(value: Any) -> dict[str, Any]:
    """What JSON keeps of a dataclass: its fields, without the shelf that an image lies on."""
    names = [field.name for field in dataclasses.fields(value) if field.name != "shelf"]
    return {name: getattr(value, name) for name in names}


def from_json(text: str, shelf: ByteStore | None = None) -> Manifest:
    """The manifest that `to_json` wrote, its stored images on `shelf`.

    Raises ValueError, KeyError or TypeError for other text.
    """
    data = json.loads(text)

    def image(kept: Any) -> Image | None:
        return StoredImage(shelf, **kept) if isinstance(kept, dict) and shelf else kept

    records = (
        Record(**{**r, "image": image(r["image"]), "texts": tuple(Text(**t) for t in r["texts"])})
        for r in data["records"]
    )
    problems = (Problem(**p) for p in data["problems"])
    return Manifest(**{**data, "records": tuple(records), "problems": tuple(problems)})


def _with_texts(record: Record, texts: list[Text]) -> Record:
    mirrorable = record.mirrorable and not names_sides(texts)
    return dataclasses.replace(record, texts=(*record.texts, *texts), mirrorable=mirrorable)


def names_sides(texts: Iterable[Text]) -> bool:
    """Whether a text says left or right, so that mirroring its image could make it false."""
    return any(_SIDES.search(t.prompt) or _SIDES.search(t.target) for t in texts)


Stats = dict[Path, os.stat_result]


def _stat(captions: coco.Captions) -> Stats:
    """The files that are there, so that a missing one is one without an entry."""
    found = {}
    for entry in captions.entries:
        if entry.path is not None and os.path.isfile(entry.path):
            found[entry.path] = entry.path.stat()
    return found


def _check(
    folder: Path, split: str, source: str, captions: coco.Captions,
    stats: Stats, threads: int | None, progress: bool,
) -> Manifest:  # fmt: skip
    faults = image_faults(captions.entries, stats, threads, progress)
    records = tuple(
        _record(entry, captions.directional)
        for entry, fault in zip(captions.entries, faults, strict=True)
        if fault is None or fault.action == "converted"
    )
    problems = tuple(fault for fault in faults if fault is not None) + captions.problems
    sizes: dict[Image, int] = {str(path): stat.st_size for path, stat in stats.items()}
    return Manifest(split, records, source, str(folder), fingerprint(records, sizes), problems)


def image_faults(
    entries: Sequence[coco.Entry], stats: Stats, threads: int | None, progress: bool
) -> list[Problem | None]:
    """What is wrong with the image of each entry; what is not in `stats` is missing."""
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
    return image_fault(name, entry.path)


def image_fault(name: str, source: images.Source, named: str | None = None) -> Problem | None:
    """What is wrong with an image that messages call `name`; `named` is as `images.check`'s."""
    try:
        conversion = images.check(source, named)
    except images.ImageError as error:
        return Problem(name, error.what, "left out")
    except OSError as error:
        return Problem(name, f"unreadable: {error.strerror}", "left out")
    return Problem(name, conversion, "converted") if conversion else None


def _record(entry: coco.Entry, directional: bool) -> Record:
    texts = tuple(Text(prompt="", target=caption) for caption in entry.captions)
    image = str(entry.path) if entry.path else None
    return Record(entry.id, image, texts, mirrorable=not directional and not names_sides(texts))


def fingerprint(records: Iterable[Record], sizes: Mapping[Image, int]) -> str:
    """SHA-256 over what training sees of records; `sizes` are the images' in bytes."""
    digest = hashlib.sha256()
    for record in records:
        texts = [[text.prompt, text.target] for text in record.texts]
        size = sizes[record.image] if record.image else None
        digest.update(json.dumps([record.id, size, texts, record.mirrorable]).encode())
    return digest.hexdigest()


def refuse_bad(
    listed_as: str,
    listed: int,
    kept: int,
    problems: Iterable[Problem],
    max_bad_share: float,
    hint: str = "",
) -> None:
    """Raises ValueError where too many of what a file lists are bad, or none is left.

    `listed_as` names them, such as "images of 'train' in /data"; the first bad ones are those
    of the `problems` that come first; `hint` says what may be behind them.
    """
    bad = listed - kept
    share = bad / max(listed, 1)
    if kept and share <= max_bad_share:
        return
    out = [f"{p.file} ({p.what})" for p in problems if p.action == "left out"]
    first = f", first {', '.join(out[: min(bad, 10)])}" if bad else ""
    raise ValueError(
        f"{bad} of the {listed} {listed_as} are bad ({share:.1%}, allowed are "
        f"{max_bad_share:.1%}){first}{hint}. Mend or remove them, or raise data.max_bad_share"
    )


def _cache_key(folder: Path, split: str, source: str, captions: coco.Captions, stats: Stats) -> str:
    digest = hashlib.sha256(captions.path.read_bytes())
    setting = [FORMAT, PIL.__version__, str(folder), split, source]
    digest.update(json.dumps(setting).encode())
    for entry in captions.entries:
        stat = stats.get(entry.path) if entry.path else None
        digest.update(json.dumps([entry.file, stat and [stat.st_size, stat.st_mtime_ns]]).encode())
    return digest.hexdigest()


def _from_cache(path: Path, shelf: ByteStore | None) -> Manifest:
    try:
        with naming(f"the cached manifest {path}"):
            return from_json(path.read_text(encoding="utf-8"), shelf)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the cached manifest {path} is damaged ({error}): delete it") from error
