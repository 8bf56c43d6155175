"""What had better not be trained on: copies, leaks, blank and odd pictures, poor captions.

Filters look at all splits and drop examples of the training split alone, so that what is scored on
stays. Of copies the one that is scored on stays, else the first that has no other fault. What they
drop becomes a file (`write_manifest`) that `data.manifest` reads: ids and reasons, no copies of
data.

A filter is a dataclass with a `threshold` and a call, `Pictures` -> `Case`s, of `FILTERS` or
`package.module:CLASS`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from unified_mm.config import check_options, option, read_options
from unified_mm.data import images
from unified_mm.data.records import UNSPACED, Manifest, Problem, Record, Stored, content_of
from unified_mm.files import naming, read_json, user_path, write_atomically, write_json
from unified_mm.registry import resolve

FORMAT = 1
PART = 4096  # pictures that are looked at, and kept, at a time
SIDE = 32  # of the small pictures that hashes are made of, and that copies are confirmed on
WHITE = 240  # from here on a brighter copy may have lost what was there
HASHED = 8  # lowest frequencies down and across that a hash has the signs of


@dataclass(frozen=True)
class Case:
    """An example that a filter drops, or nearly.

    Attributes:
      place: among the pictures that the filters looked at.
      measure: it is dropped where this is at most the filter's threshold.
      reason: in words, after which the name of `other` is put.
      other: the place of the example that it is a copy of; -1 for none.
    """

    place: int
    measure: float
    reason: str
    other: int = -1


@dataclass(frozen=True)
class Pictures:
    """What filters look at, an entry for each example; those that are scored on come first.

    Attributes:
      splits, records: of the examples.
      trained: which are trained on.
      digests: of the files' bytes.
      sizes: width and height, (0, 0) without a picture.
      small: the pictures, squeezed.
    """

    splits: tuple[str, ...]
    records: tuple[Record, ...]
    trained: np.ndarray
    digests: tuple[bytes, ...]
    sizes: Int[np.ndarray, "images 2"]
    small: UInt8[np.ndarray, "images side side 3"]

    def named(self, place: int) -> str:
        """Returns an example's split and id."""
        return f"{self.splits[place]}/{self.records[place].id}"

    def told(self, case: Case) -> str:
        """Returns why an example is dropped."""
        if case.other < 0:
            return case.reason
        leak = ", which is scored on" * (not self.trained[case.other])
        return f"{case.reason} {self.named(case.other)}{leak}"


def look_at(
    manifests: Mapping[str, Manifest],
    train_split: str,
    cache: Path | None = None,
    threads: int = 4,
) -> Pictures:
    """Reads every picture once, and keeps a small one of each.

    Args:
      manifests: by split.
      train_split: the split that is trained on.
      cache: what was looked at is kept in its `looked/`, part by part, so that what was stopped
        goes on, and other filters need not look again; None keeps nothing.
      threads: that decode.

    Raises:
      ValueError: a picture cannot be read, or what was kept is damaged.
    """
    order = sorted(manifests, key=lambda split: split == train_split)
    pairs = [(split, record) for split in order for record in manifests[split].records]
    records = tuple(record for _, record in pairs)
    with ThreadPoolExecutor(threads) as pool:
        parts = [
            looked_at(records[start : start + PART], cache, pool)
            for start in range(0, len(records), PART)
        ]
    digests, sizes, small = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Pictures(
        tuple(split for split, _ in pairs),
        records,
        np.array([split == train_split for split, _ in pairs]),
        tuple(
            digest.tobytes() * bool(size[0]) for digest, size in zip(digests, sizes, strict=True)
        ),
        sizes,
        small,
    )


Looked = tuple[np.ndarray, np.ndarray, np.ndarray]  # digests [16 bytes], sizes and small pictures


def looked_at(records: Sequence[Record], cache: Path | None, pool: ThreadPoolExecutor) -> Looked:
    """Returns what is kept of pictures, or looks at them now, and keeps it."""
    if cache is None:
        return look_now(records, pool)
    path = cache / "looked" / f"{digest_of(records)}.npz"
    if path.is_file():
        try:
            with np.load(io.BytesIO(path.read_bytes())) as kept:
                return kept["digests"], kept["sizes"], kept["small"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged: delete it, and it is made again") from error
    digests, sizes, small = look_now(records, pool)
    content = io.BytesIO()
    np.savez(content, digests=digests, sizes=sizes, small=small)
    with naming(f"data.cache_dir={cache}"):
        write_atomically(path, content.getvalue())
    return digests, sizes, small


def digest_of(records: Sequence[Record]) -> str:
    """Returns a digest of where pictures lie, of their sizes, and of files' times of change."""
    digest = hashlib.sha256(repr([FORMAT, SIDE]).encode())
    for record in records:
        image = record.image
        file = os.stat(image) if isinstance(image, str) else None
        known = (file.st_size, file.st_mtime_ns) if file else getattr(image, "size", 0)
        digest.update(repr([str(image), known]).encode())
    return digest.hexdigest()[:32]


def look_now(records: Sequence[Record], pool: ThreadPoolExecutor) -> Looked:
    """Looks at pictures."""

    def one(record: Record) -> Looked:
        image = record.image
        if image is None:
            return np.zeros(16, np.uint8), np.zeros(2, int), np.zeros((SIDE, SIDE, 3), np.uint8)
        content = content_of(image)
        try:
            pixels = images.decode(content)
        except images.ImageError as error:
            raise images.ImageError(str(image), error.what) from error
        # A box takes whole pixels: where they do not divide, a smaller copy would be seen shifted.
        squeezed = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.HAMMING)
        digest = np.frombuffer(hashlib.sha256(content).digest()[:16], np.uint8)
        return digest, np.array([pixels.shape[1], pixels.shape[0]]), np.asarray(squeezed)

    digests, sizes, small = zip(*pool.map(one, records), strict=True)
    return np.stack(digests), np.stack(sizes), np.stack(small)


def in_parts(function: Callable[[np.ndarray], np.ndarray], small: np.ndarray) -> Any:
    """Returns what a function makes of pictures, some at a time, for the memory's sake."""
    return np.concatenate(
        [function(small[start : start + PART]) for start in range(0, len(small), PART)]
    )


def perceptual_hashes(small: UInt8[np.ndarray, "images side side 3"]) -> Any:
    """Returns 64 bits a picture: which of its lowest frequencies are above their median."""
    steps = np.arange(SIDE)
    cosines = np.cos(np.pi * (2 * steps + 1) * steps[:HASHED, None] / (2 * SIDE))
    cosines = cosines.astype(np.float32)

    def hashes(part: np.ndarray) -> np.ndarray:
        grey = part.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        flat = (cosines @ grey @ cosines.T).reshape(len(part), -1)
        # The mean brightness says nothing of what is seen.
        bits = flat > np.median(flat[:, 1:], axis=1, keepdims=True)
        found: np.ndarray = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
        return found

    return in_parts(hashes, small)


def near_pairs(
    hashes: Any, others: Any, bits: int, block: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields places i < j, block by block, of hashes i and others j that differ in few bits."""
    for start in range(0, len(hashes), block):
        rows = hashes[start : start + block, None]
        near = np.bitwise_count(rows ^ others[None, start:]) <= bits
        near[:, : len(rows)] = np.triu(near[:, : len(rows)], 1)
        i, j = np.nonzero(near)
        yield start + i, start + j


def differences(ones: Any, others: Any) -> Float[np.ndarray, " pairs"]:
    """Returns how unlike small pictures are, pair by pair, whatever their brightness and contrast.

    It is the largest difference of a square of 4 x 4 pixels, in steps of 255, after the brighter is
    fitted by the other where neither is white.
    """
    x, y = ones.astype(np.float32), others.astype(np.float32)
    seen = ((x < WHITE) & (y < WHITE)).astype(np.float32)
    axes = (1, 2, 3)
    count = np.maximum(seen.sum(axes, keepdims=True), 1)
    x, y = ((each - (each * seen).sum(axes, keepdims=True) / count) * seen for each in (x, y))
    spread_x, spread_y = (np.square(each).sum(axes, keepdims=True) for each in (x, y))
    gain = (x * y).sum(axes, keepdims=True) / np.maximum(spread_x, 1e-3)
    rest = y - gain * x
    # Of two pictures each may be the brighter: the residue is told at the brightness of the other.
    rest = rest / np.maximum(np.sqrt(spread_y / np.maximum(spread_x, 1e-3)), 1)
    parts = rest.reshape(len(rest), SIDE // 4, 4, SIDE // 4, 4, 3).mean((2, 4))
    found: np.ndarray = np.sqrt(np.square(parts).mean(-1)).max((1, 2))
    return found


@dataclass(frozen=True)
class Copies:
    """Copies by bytes, and by hashes of the picture and of its mirror image.

    What hashes find is confirmed on the pixels. Examples without a picture, such as sounds and
    clips, are copies where all their files are.

    Attributes:
      threshold: the difference of pixels up to which two pictures are one.
      bits: of 64, that hashes of copies may differ in.
      mirrored: whether a mirror image is a copy.
    """

    threshold: float = 14.0
    bits: int = option(12, least=0, most=32)
    mirrored: bool = True

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        first: dict[bytes, int] = {}
        for place, digest in enumerate(pictures.digests):
            if digest and first.setdefault(digest, place) != place:
                yield from self.case(pictures, first[digest], place, 0.0, "the same file as")
        for kept, place in same_files(pictures.records):
            yield from self.case(pictures, kept, place, 0.0, "the same file as")
        # What has the same bytes as an earlier one is told already: each file is compared once.
        there = np.sort(np.fromiter(first.values(), int, len(first)))
        there = there[(pictures.sizes[there] > 0).all(1)]
        small = pictures.small
        turned = small[:, :, ::-1]
        hashes = perceptual_hashes(small)
        kinds = [(hashes, small, "a copy of")]
        if self.mirrored:
            kinds.append((perceptual_hashes(turned), turned, "a mirror image of"))
        for others, seen, reason in kinds:
            for i, j in near_pairs(hashes[there], others[there], self.bits):
                trained = pictures.trained[there[j]]
                i, j = there[i[trained]], there[j[trained]]
                for start in range(0, len(i), 1024):
                    one, other = i[start : start + 1024], j[start : start + 1024]
                    unlike = differences(small[one], seen[other])
                    for near in np.flatnonzero(unlike <= 2 * self.threshold):
                        pair = int(one[near]), int(other[near])
                        yield from self.case(pictures, *pair, float(unlike[near]), reason)

    def case(
        self, pictures: Pictures, kept: int, place: int, measure: float, reason: str
    ) -> Iterator[Case]:
        """Yields the case of a pair, unless both are scored on."""
        if pictures.trained[place]:
            yield Case(place, measure, reason, kept)


def same_files(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Yields the places of each example without a picture and of the first with the same files.

    Only files of which there are others as large are read.
    """
    alike: dict[Any, list[int]] = {}
    for place, record in enumerate(records):
        parts = [] if record.image is not None else sorted(record.parts.items())
        if parts and all(isinstance(part, (str, Stored)) for _, part in parts):
            sizes = [
                (name, os.path.getsize(part) if isinstance(part, str) else part.size)
                for name, part in parts
            ]
            alike.setdefault(tuple(sizes), []).append(place)
    for places in alike.values():
        first: dict[Any, int] = {}
        for place in places if len(places) > 1 else ():
            parts = sorted(records[place].parts.items())
            digests = tuple(hashlib.sha256(content_of(part)).digest() for _, part in parts)
            if (kept := first.setdefault(digests, place)) != place:
                yield kept, place


@dataclass(frozen=True)
class Blank:
    """Pictures of one colour: `threshold` is the deviation of their pixels, of 255."""

    threshold: float = 3.0

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        deviations = in_parts(
            lambda part: part.astype(np.float32).std((1, 2)).max(-1), pictures.small
        )
        for place in np.flatnonzero(has_picture(pictures) & (deviations <= 2 * self.threshold)):
            yield Case(int(place), float(deviations[place]), "of one colour")


@dataclass(frozen=True)
class Small:
    """Pictures whose shorter side has at most `threshold` pixels."""

    threshold: float = 31.0

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        shorter = pictures.sizes.min(1)
        for place in np.flatnonzero(has_picture(pictures) & (shorter <= 2 * self.threshold)):
            yield Case(int(place), float(shorter[place]), f"{shorter[place]} pixels on a side")


@dataclass(frozen=True)
class Narrow:
    """Pictures whose shorter side is at most `threshold` of the longer one."""

    threshold: float = 0.25

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        share = pictures.sizes.min(1) / np.maximum(pictures.sizes.max(1), 1)
        for place in np.flatnonzero(has_picture(pictures) & (share <= 2 * self.threshold)):
            width, height = pictures.sizes[place]
            yield Case(int(place), float(share[place]), f"{width} x {height} pixels")


@dataclass(frozen=True)
class Terse:
    """Examples whose longest caption has at most `threshold` words; names of classes are none.

    Where words are not set apart each character is one.
    """

    threshold: float = 1.0

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        for place, record in enumerate(pictures.records):
            captions = [text.target for text in record.texts if not text.prompt]
            if not pictures.trained[place] or not captions or record.labels:
                continue
            words = max(len(UNSPACED.sub(r" \g<0> ", each).split()) for each in captions)
            if words <= 2 * self.threshold:
                yield Case(place, float(words), f"{words} word{'s' * (words != 1)} at most")


@dataclass(frozen=True)
class Repeated:
    """Examples all of whose captions many others have too, such as the name of a camera.

    `threshold` is 1 / examples: one whose rarest caption ten examples have has a measure of 0.1.
    Names of classes are no captions.
    """

    threshold: float = 0.1

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        told = captions_of(pictures)
        counts = Counter(caption for captions in told.values() for caption in set(captions))
        for place, captions in told.items():
            rarest = min(captions, key=counts.__getitem__)
            if 1 / counts[rarest] <= 2 * self.threshold:
                reason = f"{counts[rarest]:,} examples have {rarest!r}"
                yield Case(place, 1 / counts[rarest], reason)


@dataclass(frozen=True)
class Script:
    """Examples of whose captions' letters at most `threshold` are of the expected script.

    Attributes:
      threshold: the share.
      script: as Unicode's names of letters begin, such as LATIN, CYRILLIC or CJK (which is here
        also of kana); '' is the one that most letters are of.
    """

    threshold: float = 0.5
    script: str = ""

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        letters = {
            place: Counter(script_of(letter) for text in captions for letter in text.lower())
            for place, captions in captions_of(pictures).items()
        }
        for counts in letters.values():
            del counts[""]
        every = sum(letters.values(), Counter())
        expected = self.script or (every.most_common(1)[0][0] if every else "")
        for place, counts in letters.items():
            if not counts:
                continue
            share = counts[expected] / counts.total()
            if share <= 2 * self.threshold:
                most = counts.most_common(1)[0][0]
                yield Case(place, share, f"{share:.0%} of its letters are {expected}; most: {most}")


def captions_of(pictures: Pictures) -> dict[int, list[str]]:
    """Returns the captions of each example that is trained on and has any, by its place."""
    found = {
        place: [text.target.strip() for text in record.texts if not text.prompt]
        for place, record in enumerate(pictures.records)
        if pictures.trained[place] and not record.labels
    }
    return {place: captions for place, captions in found.items() if captions}


@lru_cache(maxsize=65_536)
def script_of(letter: str) -> str:
    """Returns the script of a letter; '' of what is none."""
    if not letter.isalpha():
        return ""
    script = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA") else script


FILTERS = {
    "copies": Copies,
    "blank": Blank,
    "small": Small,
    "narrow": Narrow,
    "terse": Terse,
}
# Those that are not applied unless they are named; some ask a run.
ON_REQUEST = {
    "repeated": Repeated,
    "script": Script,
    "alike": "unified_mm.search.cleaning:Alike",
    "mismatched": "unified_mm.search.cleaning:Mismatched",
}


def has_picture(pictures: Pictures) -> np.ndarray:
    """Returns which examples are trained on and have a picture."""
    found: np.ndarray = pictures.trained & (pictures.sizes > 0).all(1)
    return found


def read_filter(given: str) -> tuple[str, Any]:
    """Returns the name and the filter of `NAME`, or of `NAME,threshold=20,bits=10`.

    Raises:
      ValueError: there is no such filter, or it has no such option or value.
    """
    name, *options = given.split(",")
    kind = resolve("filter", name, FILTERS | ON_REQUEST)
    values = {}
    for each in options:
        key, equals, value = each.partition("=")
        if not equals:
            raise ValueError(f"--filter={given}: an option is given as name=value")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value  # a text
    found = kind(**read_options(kind, values, f"--filter={name}"))
    check_options(found, f"--filter={name}")
    return name, found


Found = Mapping[str, tuple[Any, Sequence[Case]]]  # by its name, a filter and its cases


def of_sound_ones(found: Found) -> dict[str, tuple[Any, list[Case]]]:
    """Returns the cases without copies of what is dropped for a fault that is its own.

    Else nothing would be left of a picture of which one copy is sound. That one, the first of those
    which are the same, is what others are copies of.
    """
    faulty = {
        case.place
        for each, cases in found.values()
        for case in cases
        if case.other < 0 and case.measure <= each.threshold
    }
    heirs: dict[int, int] = {}  # by the faulty example
    for _, cases in found.values():
        for case in cases:
            if case.measure == 0 and case.other in faulty and case.place not in faulty:
                heirs[case.other] = min(case.place, heirs.get(case.other, case.place))

    def of_heirs(cases: Sequence[Case]) -> Iterator[Case]:
        for case in cases:
            heir = heirs.get(case.other, case.place)
            if case.other not in faulty:
                yield case
            elif heir != case.place:
                kept, place = sorted((heir, case.place))
                yield replace(case, place=place, other=kept)

    return {name: (each, list(of_heirs(cases))) for name, (each, cases) in found.items()}


def dropped_cases(found: Found) -> dict[int, tuple[str, Case]]:
    """Returns, by the place of each example that is dropped, the first filter's name and case."""
    dropped: dict[int, tuple[str, Case]] = {}
    for name, (each, cases) in found.items():
        for case in sorted(cases, key=lambda case: case.measure):
            if case.measure <= each.threshold:
                dropped.setdefault(case.place, (name, case))
    return dropped


def write_manifest(
    path: Path, pictures: Pictures, found: Found, data: Manifest
) -> dict[int, tuple[str, Case]]:
    """Writes what filters drop, each example once, and returns it as `dropped_cases` does.

    Args:
      path: of the file.
      pictures: that the filters looked at.
      found: what they found.
      data: the split that is trained on.
    """
    dropped = dropped_cases(found)
    rows = [
        {
            "id": pictures.records[place].id,
            "weight": 0,
            "filter": name,
            "reason": pictures.told(case),
        }
        for place, (name, case) in dropped.items()
    ]
    of = {"split": data.split, "fingerprint": data.fingerprint}
    filters = {name: repr(each) for name, (each, _) in found.items()}
    write_json(path, {"format": FORMAT, "of": of, "filters": filters, "examples": rows})
    return dropped


def cleaned(data: Any, manifest: Manifest) -> Manifest:
    """Returns a manifest without what the file `data.manifest` drops of its split.

    Raises:
      ValueError: the file is none of these, or was made of other data than is trained on.
    """
    if not data.manifest:
        return manifest
    path = user_path(data.manifest, "data.manifest")
    said = read_json(path)
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError(f"data.manifest={path}: is no manifest that unified_mm.clean wrote")
    of, examples = said["of"], said["examples"]
    if of["split"] != data.train_split:
        raise ValueError(
            f"data.manifest={path} was made of {of['split']!r}, and data.train_split="
            f"{data.train_split!r} is trained on: make it anew with unified_mm.clean, or set "
            "data.manifest=''"
        )
    if of["split"] != manifest.split:
        return manifest
    if of["fingerprint"] != manifest.fingerprint:
        raise ValueError(
            f"data.manifest={path} was made of other data than {manifest.split!r} in "
            f"{manifest.folder}: make it anew with unified_mm.clean, or set data.manifest=''"
        )
    if odd := [each for each in examples if each["weight"] not in (0, 1)]:
        raise ValueError(f"data.manifest={path}: {odd[0]}: a weight is 0 or 1")
    out = {each["id"]: each for each in examples if not each["weight"]}
    kept = tuple(record for record in manifest.records if record.id not in out)
    if not kept:
        raise ValueError(f"data.manifest={path} leaves nothing of {manifest.split!r}")
    sealed = json.dumps([manifest.fingerprint, sorted(map(str, out))])
    problems = tuple(
        Problem(str(id), f"{each['filter']}: data.manifest", "left out") for id, each in out.items()
    )
    return replace(
        manifest,
        records=kept,
        problems=(*manifest.problems, *problems),
        fingerprint=hashlib.sha256(sealed.encode()).hexdigest(),
    )
