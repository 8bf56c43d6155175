"""The validated manifest of a split: every image decoded once, the bad ones named."""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

import PIL

from unified_mm.data import clips, images, shapes, sounds
from unified_mm.data.listing import (
    Entry,
    Foil,
    Key,
    Listing,
    Question,
    id_hint,
    medium_of,
    no_text,
)
from unified_mm.data.records import ByteStore, File, Manifest, Problem, Record, Source, Stored, Text
from unified_mm.files import naming, uncollected, write_atomically

FORMAT = 4  # raise it when the checks or the caches change: older caches are not found then
# Sides in English, alone or in a word that is made of one: lefthand, left_side, rightmost.
_SIDES = re.compile(
    r"(?<![^\W\d_])(left|right)(most|wards?|hand(ed(ness)?|ers?)?|sides?|y|ies)?(?![^\W\d_])",
    re.IGNORECASE,
)
# What was once taken for sides. Fingerprints go by these, so that those of old runs stay.
_SIDES_ONCE = re.compile(r"\b(left|right)(most|wards?)?\b", re.IGNORECASE)
MISSING = "missing image"
# What decodes a file completely and says what it converted.
CHECKS = {"audio": sounds.check, "points": shapes.check, "video": clips.check}
_NAMED = 5  # files named per kind of problem in a summary


def build_manifest(
    listing: Listing,
    folder: str | os.PathLike,
    split: str,
    *,
    source: str = "coco",
    cache: str | os.PathLike | None = None,
    max_bad_share: float = 0.05,
    threads: int | None = None,
    progress: bool = True,
    sidecars: Sequence["Sidecar"] = (),
    check_at_most: int = 0,
) -> Manifest:
    """Decodes the images of a split completely, and leaves out and names what is bad.

    Args:
      listing: what the split lists.
      folder: the data folder.
      split: the name of the split.
      source: the name of the data source, for the manifest.
      cache: if given, the manifest is kept in `cache/manifests/` under a hash of the annotations
        and of each image's name, size and time of change, so unchanged data is decoded once.
      max_bad_share: the largest share of images, and of captions, that may be left out.
      threads: threads that decode images; as many as the machine has cores by default.
      progress: whether to show a progress bar on a terminal.
      sidecars: the foils and questions beside the captions.
      check_at_most: images that are decoded, of a set that has more: always the same ones; the
        others must be there. 0 for all.

    Raises:
      ValueError: too many images, captions or members of `sidecars` are left out, or none remains;
        or the cache is damaged or cannot be written.
    """
    folder = Path(folder).resolve()
    stats = _stat(listing)
    manifest = cached(
        cache,
        _cache_key(folder, split, source, listing, stats, check_at_most),
        lambda: _check(folder, split, source, listing, stats, threads, progress, check_at_most),
        partial(_with_entries, {entry.id: entry for entry in listing.entries}),
        _without_entries,
    )
    # Faults of images come before those of captions.
    listed_as, remaining = f"images of {split!r} in {folder}", len(manifest.records)
    # One bad picture is a large share of the few that are held out of a folder.
    there = len(listing.listed) + listing.apart * (remaining > 0)
    listed_as += " and its other part" * (there > len(listing.listed))
    looked = listing.looked if any(p.what == MISSING for p in manifest.problems) else ""
    bad = len(listing.listed) - remaining
    refuse_bad(listed_as, there, there - bad, manifest.problems, max_bad_share, looked)
    if listing.annotations:
        out = [each for each in listing.caption_problems if each.action == "left out"]
        listed_as = f"captions of {split!r} in {listing.path}"
        left = listing.annotations - len(out)
        refuse_bad(listed_as, listing.annotations, left, out, max_bad_share, listing.hint)
    return with_orphans(manifest, sidecars, listing.listed, listing.path)


def cached(
    cache: str | os.PathLike | None,
    key: str,
    make: Callable[[], Manifest],
    read: Callable[[str], Manifest],
    write: Callable[[Manifest], str],
) -> Manifest:
    """Returns the manifest that `cache/manifests/` holds under a key, or makes and keeps it.

    Args:
      cache: the cache's folder; None makes the manifest without keeping it.
      key: a hash of all that the manifest depends on.
      make: makes the manifest.
      read: gives the manifest back from the text that `write` made of it; raises ValueError,
        KeyError or TypeError where the text is damaged.
      write: gives the text to keep.

    Raises:
      ValueError: the cached manifest is damaged, or the cache cannot be written.
    """
    if cache is None:
        return make()
    path = Path(cache) / "manifests" / f"{key}.json"
    if os.path.isfile(path):
        return _from_cache(path, read)
    manifest = make()
    with naming(f"data.cache_dir={cache}"):
        write_atomically(path, write(manifest).encode())
    return manifest


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The foils or the questions beside a split's captions, by the ids of their images.

    Those on images that are not listed are counted as problems.

    Attributes:
      what: "foil" or "question".
      image_ids: the image id of each.
      max_bad_share: the largest share of them that may be on images that are not listed.
    """

    what: str
    image_ids: Sequence[Key]
    max_bad_share: float

    def orphans(self, listed: Set[Key], where: object) -> list[Problem]:
        """Returns a problem for each foil or question on an image that is not listed in `where`.

        Raises:
          ValueError: more than `max_bad_share` of them are on such images, or all.
        """
        fault = f"{self.what} on an image that is not listed"
        found = [
            Problem(f"{self.what} {number}", fault, "left out")
            for number, image in enumerate(self.image_ids)
            if image not in listed
        ]
        if found:
            listed_as = f"{self.what}s beside {where}"
            left = len(self.image_ids) - len(found)
            hint = id_hint(listed, self.image_ids)
            refuse_bad(listed_as, len(self.image_ids), left, found, self.max_bad_share, hint)
        return found


def with_orphans(
    manifest: Manifest, sidecars: Iterable[Sidecar], listed: Set[Key], where: object
) -> Manifest:
    """Returns the manifest with the sidecars' members on unlisted images added to its problems."""
    orphans = [each for members in sidecars for each in members.orphans(listed, where)]
    return dataclasses.replace(manifest, problems=(*manifest.problems, *orphans))


def without_bad_parts(
    manifest: Manifest, modalities: Mapping[str, Any], max_bad_share: float
) -> Manifest:
    """Returns the manifest without examples of which a part is bad; they are among its problems.

    Images were decoded by the source; this asks the modalities that can tell, by their `fault`.

    Args:
      manifest: as its source gives it.
      modalities: the modalities that read the parts, by name.
      max_bad_share: the largest share of a modality's parts that may be bad.

    Raises:
      ValueError: more of them are bad, or all.
    """
    checks = {name: each.fault for name, each in modalities.items() if hasattr(each, "fault")}
    bad: set[int | str] = set()
    problems: list[Problem] = []
    for name, fault in checks.items():
        held = {
            record.id: record.parts[name] for record in manifest.records if name in record.parts
        }
        faults = {id: found for id, part in held.items() if (found := fault(part))}
        found = [Problem(f"{name} of {id!r}", faults[id], "left out") for id in faults]
        where = f"{name}s of {manifest.split!r} in {manifest.folder}"
        if held:
            refuse_bad(where, len(held), len(held) - len(faults), found, max_bad_share)
        bad |= set(faults)
        problems += found
    if not bad:
        return manifest
    kept = tuple(record for record in manifest.records if record.id not in bad)
    left_out = json.dumps(sorted(map(str, bad)))
    sealed = hashlib.sha256((manifest.fingerprint + left_out).encode()).hexdigest()
    all_problems = (*manifest.problems, *problems)
    return dataclasses.replace(manifest, records=kept, problems=all_problems, fingerprint=sealed)


def with_questions(manifest: Manifest, questions: Iterable[Question]) -> Manifest:
    """Returns the manifest with the questions of its images added to the texts of their records.

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


def with_foils(manifest: Manifest, foils: Sequence[Foil]) -> Manifest:
    """Returns the manifest with the foils of its captions in their records.

    Foils of other captions, and those that are captions of the same example, are among its
    problems. The fingerprint changes.
    """
    captions = {r.id: {t.target for t in r.texts if not t.prompt} for r in manifest.records}
    own: dict[int | str, list[tuple[str, str]]] = {}
    problems: list[Problem] = []
    for number, each in enumerate(foils):
        if each.image_id not in captions:
            continue
        caption, false = each.caption.strip(), each.foil.strip()
        fault = no_text(each.foil, "foil")
        if caption not in captions[each.image_id]:
            fault = "foil of a caption that its example has not"
        elif false in captions[each.image_id]:
            fault = "foil that is a caption of its example"
        if fault:
            problems.append(Problem(f"foil {number}", fault, "left out"))
        else:
            own.setdefault(each.image_id, []).append((caption, false))
    records = tuple(
        dataclasses.replace(record, foils=tuple(own.get(record.id, ())))
        for record in manifest.records
    )
    added = json.dumps([[record.id, record.foils] for record in records])
    return dataclasses.replace(
        manifest,
        records=records,
        fingerprint=hashlib.sha256((manifest.fingerprint + added).encode()).hexdigest(),
        problems=(*manifest.problems, *problems),
    )


def summary(manifest: Manifest) -> str:
    """Returns one paragraph for people: counts, and every kind of problem with its files."""
    records = manifest.records
    texts = sum(len(r.texts) for r in records)
    found = Counter(name for record in records for name in record.parts)
    kinds = sorted(found or {"image"}, key=lambda name: (name != "image", name))
    listed = ", ".join(f"{found[name]:,} {name.removesuffix('s')}s" for name in kinds)
    parts = [
        f"{manifest.source} {manifest.split}: {listed} "
        f"and {texts:,} texts in {len(records):,} examples from {manifest.folder}"
    ]
    counts = {f"without {name}": len(records) - found[name] for name in sorted(kinds)}
    counts["without text"] = sum(not r.texts for r in records)
    counts["never mirrored"] = sum(not r.mirrorable for r in records)
    parts += [f"{count:,} {name}" for name, count in counts.items() if count]
    if manifest.unchecked:
        parts.append(f"{manifest.unchecked:,} images are not decoded before they are met")
    return "; ".join(parts + problem_counts(manifest.problems)) + "."


def problem_counts(problems: Iterable[Problem]) -> list[str]:
    """Returns a phrase for each kind of problem: their number, and the first of their files."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        kinds.setdefault((problem.action, problem.what), []).append(problem.file)
    phrases = []
    for (action, what), files in sorted(kinds.items()):
        more = ", ..." if len(files) > _NAMED else ""
        phrases.append(f"{action}: {len(files):,} x {what} ({', '.join(files[:_NAMED])}{more})")
    return phrases


def to_json(manifest: Manifest) -> str:
    """Returns the manifest as JSON text; `from_json` gives an equal one back."""
    return json.dumps(manifest, default=_members)  # ASCII: paths need not be UTF-8


_STORED = "stored image"  # the key under which JSON keeps any part that lies on a shelf


def _members(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that JSON keeps.

    The `shelf` of what is stored is none of them, nor are a record's foils, which are added later.
    """
    left = ("shelf", "foils")
    names = [field.name for field in dataclasses.fields(value) if field.name not in left]
    members = {name: getattr(value, name) for name in names}
    return {_STORED: members} if isinstance(value, Stored) else members


@uncollected()
def from_json(text: str, shelves: Mapping[str, ByteStore]) -> Manifest:
    """Returns the manifest that `to_json` wrote, its stored parts on the shelves of modalities.

    Raises:
      ValueError, KeyError, TypeError: the text is not such a manifest.
    """
    data = json.loads(text)

    def record(
        id: int | str, parts: dict, texts: list, mirrorable: bool, labels: Sequence[str] = ()
    ) -> Record:
        for name, part in parts.items():
            if isinstance(part, dict) and _STORED in part:
                if name not in shelves:
                    raise ValueError(f"holds {name}s that are stored in another file")
                parts[name] = Stored(shelves[name], **part[_STORED])
        read = tuple(Text(**text) for text in texts)
        return Record(id, parts, read, mirrorable, tuple(labels))

    records = (record(**each) for each in data["records"])
    problems = (Problem(**p) for p in data["problems"])
    return Manifest(**{**data, "records": tuple(records), "problems": tuple(problems)})


def _without_entries(manifest: Manifest) -> str:
    """Returns a manifest as JSON text without what its listing tells, for `_with_entries`."""
    records = tuple(Record(each.id, {}, (), each.mirrorable) for each in manifest.records)
    return to_json(dataclasses.replace(manifest, records=records))


@uncollected()
def _with_entries(entries: Mapping[Key, Entry], text: str) -> Manifest:
    bare = from_json(text, {})
    for each in bare.records:
        if each.id not in entries:
            raise ValueError(f"it holds an example {each.id!r} that the list lacks")
    records = tuple(_record(entries[each.id], each.mirrorable) for each in bare.records)
    return dataclasses.replace(bare, records=records)


def _with_texts(record: Record, texts: list[Text]) -> Record:
    mirrorable = record.mirrorable and not names_sides(texts)
    return dataclasses.replace(record, texts=(*record.texts, *texts), mirrorable=mirrorable)


def names_sides(texts: Iterable[Text]) -> bool:
    """Returns whether a text names a side in English: flipping its image could make it false."""
    return _any_match(_SIDES, texts)


def _any_match(pattern: re.Pattern, texts: Iterable[Text]) -> bool:
    return any(pattern.search(t.prompt) or pattern.search(t.target) for t in texts)


Stats = dict[Path, os.stat_result]


@uncollected()
def _stat(listing: Listing) -> Stats:
    """Returns the status of each part that is a file of its own; a missing one has no entry."""
    files = {entry.image for entry in listing.entries if isinstance(entry.image, Path)}
    files |= {file for entry in listing.entries for _, file in entry.parts}
    found = ((file, _status(file)) for file in files)
    return {file: status for file, status in found if status}


def _status(file: Path) -> os.stat_result | None:
    """Returns the status of what `os.path.isfile` calls a file, else None."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):  # it is not there, or its name can be none
        return None
    return found if S_ISREG(found.st_mode) else None


def _check(
    folder: Path, split: str, source: str, listing: Listing,
    stats: Stats, threads: int | None, progress: bool, check_at_most: int,
) -> Manifest:  # fmt: skip
    left_alone = _left_alone(listing.entries, check_at_most)
    entries, media = listing.entries, listing.media
    faults = image_faults(entries, stats, threads, progress, left_alone, media)
    records = tuple(
        _record(entry, not listing.directional and not names_sides(entry.texts))
        for entry, fault in zip(listing.entries, faults, strict=True)
        if fault is None or fault.action == "converted"
    )
    problems = tuple(fault for fault in faults if fault is not None) + listing.problems
    sizes: dict[File, int] = {str(path): stat.st_size for path, stat in stats.items()}
    sizes |= {e.image: e.image.size for e in listing.entries if isinstance(e.image, Stored)}
    sealed = fingerprint(records, sizes)
    return Manifest(split, records, source, str(folder), sealed, problems, len(left_alone))


def _left_alone(entries: Sequence[Entry], check_at_most: int) -> frozenset[Key]:
    """Returns the ids of the images that are not decoded: those whose ids hash highest."""
    if not 0 < check_at_most < len(entries):
        return frozenset()
    ranked = sorted(entries, key=lambda entry: hashlib.sha256(repr(entry.id).encode()).digest())
    return frozenset(entry.id for entry in ranked[check_at_most:])


def image_faults(
    entries: Sequence[Entry],
    stats: Stats,
    threads: int | None,
    progress: bool,
    left_alone: Set[Key] = frozenset(),
    media: Mapping[str, str] | None = None,
) -> list[Problem | None]:
    """Returns the problem of each entry's files or None; a file that `stats` lacks is missing.

    Files of entries in `left_alone` are not decoded. `media` is that of `Listing`.
    """
    from tqdm import tqdm

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        checks = pool.map(
            lambda e: _image_fault(e, stats, e.id not in left_alone, media or {}), entries
        )
        disable = None if progress else True  # None: no bar where there is no terminal
        return list(tqdm(checks, "checking images", len(entries), unit="image", disable=disable))


def _image_fault(
    entry: Entry, stats: Stats, decoded: bool, media: Mapping[str, str]
) -> Problem | None:
    """Returns the first problem of an entry's files that leaves it out, else what is converted."""
    faults = [
        _file_fault(media.get(modality, modality), file, stats, decoded)
        for modality, file in entry.parts
    ]
    return worst([*faults, _picture_fault(entry, stats, decoded)])


def worst(faults: Iterable[Problem | None]) -> Problem | None:
    """Returns the first problem that leaves an example out, else the first one, if any."""
    found = sorted((each for each in faults if each), key=lambda each: each.action == "converted")
    return found[0] if found else None


def _file_fault(medium: str, file: Path, stats: Stats, decoded: bool) -> Problem | None:
    """Returns the problem of a file that is no picture, by its medium or else by its name."""
    kind = medium if medium in CHECKS else medium_of(file)
    if file not in stats:
        return Problem(str(file), f"missing {kind}", "left out")
    return part_fault(str(file), kind, file) if decoded else None


def part_fault(name: str, medium: str, source: Source) -> Problem | None:
    """Checks a file that is no picture and returns its problem, or None for a good one."""
    check = CHECKS.get(medium, sounds.check)
    try:
        conversion = check(source)
    except (sounds.SoundError, clips.ClipError, shapes.ShapeError) as error:
        return Problem(name, error.what, "left out")
    return Problem(name, conversion, "converted") if conversion else None


def _picture_fault(entry: Entry, stats: Stats, decoded: bool) -> Problem | None:
    if entry.image is None:
        return None
    name = str(entry.file)
    if isinstance(entry.image, Path) and entry.image not in stats:
        return Problem(name, MISSING, "left out")
    if not decoded:
        return None
    if isinstance(entry.image, Stored):
        return image_fault(f"{entry.image.shelf}: {name}", entry.image, name)
    return image_fault(name, entry.image)


def image_fault(name: str, source: Source, named: str | None = None) -> Problem | None:
    """Checks an image and returns its problem, or None for a good one.

    Args:
      name: the image's name in messages.
      source: a path, the bytes of a file, or a stored image.
      named: the file name of a source that is not a path, as in `images.check`.
    """
    try:
        conversion = images.check(source, named)
    except images.ImageError as error:
        return Problem(name, error.what, "left out")
    except OSError as error:
        return Problem(name, f"unreadable: {error.strerror}", "left out")
    return Problem(name, conversion, "converted") if conversion else None


def _record(entry: Entry, mirrorable: bool) -> Record:
    found = str(entry.image) if isinstance(entry.image, Path) else entry.image
    parts = {} if found is None else {"image": found}
    parts |= {name: str(file) for name, file in entry.parts}
    return Record(entry.id, parts, entry.texts, mirrorable, entry.labels)


def fingerprint(records: Iterable[Record], sizes: Mapping[File, int]) -> str:
    """Returns the SHA-256 over what training sees of records; `sizes` are the files' in bytes."""
    digest = hashlib.sha256()
    for record in records:
        texts = [[text.prompt, text.target] for text in record.texts]
        size = sizes[record.image] if record.image else None
        mirrorable = record.mirrorable or _sides_learned_since(record.texts)
        seen: list[Any] = [record.id, size, texts, mirrorable]
        if others := sorted(
            (name, sizes[p]) for name, p in record.parts.items() if name != "image"
        ):
            seen.append(others)
        # Those of pictures in folders of classes are their texts.
        if record.labels and record.labels != tuple(text.target for text in record.texts):
            seen.append(record.labels)
        digest.update(json.dumps(seen).encode())
    return digest.hexdigest()


def _sides_learned_since(texts: Iterable[Text]) -> bool:
    return names_sides(texts) and not _any_match(_SIDES_ONCE, texts)


def refuse_bad(
    listed_as: str,
    listed: int,
    kept: int,
    problems: Iterable[Problem],
    max_bad_share: float,
    hint: str = "",
) -> None:
    """Raises ValueError if too many of what a file lists are bad, or none is left.

    Args:
      listed_as: the plural noun for messages, such as "images of 'train' in /data".
      listed: how many the file lists.
      kept: how many of them are kept.
      problems: the problems found; the message names the first that were left out.
      max_bad_share: the largest share that may be bad.
      hint: a likely cause, appended to the message.

    Raises:
      ValueError: the share of bad ones is above `max_bad_share`, or `kept` is 0.
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


@uncollected()
def _cache_key(
    folder: Path, split: str, source: str, listing: Listing, stats: Stats, check_at_most: int
) -> str:
    setting = [FORMAT, PIL.__version__, str(folder), split, source, check_at_most]
    setting += [listing.directional, listing.stamp, *sorted(listing.media.items())]
    digest = hashlib.sha256(json.dumps([setting, listing.problems], default=_members).encode())
    for entry in listing.entries:
        texts = [(text.prompt, text.target) for text in entry.texts]
        image = entry.image and _state(entry.image, stats)
        parts = [(name, _state(file, stats)) for name, file in entry.parts]
        known = (entry.id, entry.file, image, texts, parts, entry.labels)
        digest.update(repr(known).encode())  # half the time of JSON
    return digest.hexdigest()


def _state(file: Path | Stored, stats: Stats) -> tuple[Any, ...]:
    """Returns what tells whether a file has changed."""
    if isinstance(file, Stored):
        return file.number, file.name, file.size
    stat = stats.get(file)
    return str(file), stat and (stat.st_size, stat.st_mtime_ns)


def _from_cache(path: Path, read: Callable[[str], Manifest]) -> Manifest:
    try:
        with naming(f"the cached manifest {path}"):
            return read(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the cached manifest {path} is damaged ({error}): delete it") from error
