"""A TFDS dataset in `array_record` format as a data source, without TensorFlow.

It reads datasets that `python -m unified_mm.prepare` wrote, or that TFDS prepared with
`file_format='array_record'`, such as TFDS' `coco_captions`: an image feature, and captions as a
text, a sequence of texts, or a sequence of groups with a text in each. `data.tfds` names the
features that have unusual names. Files of questions and foils may lie in `annotations/`, as they do
in a COCO folder. What `prepare` wrote holds other modalities too: `prepared.json` says which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from unified_mm.data import checked_json
from unified_mm.data.manifest import (
    FORMAT,
    Sidecar,
    cached,
    fingerprint,
    from_json,
    image_fault,
    names_sides,
    part_fault,
    refuse_bad,
    to_json,
    with_orphans,
    worst,
)
from unified_mm.data.mirror import Mirror, is_remote
from unified_mm.data.records import File, Manifest, Problem, Record, Stored, Text
from unified_mm.data.sources import AnnotatedFolder, cache_folder
from unified_mm.data.tfds_dataset import (
    FEATURES,
    FILE_FORMAT,
    INFO,
    Shard,
    Split,
    feature_dict,
    open_builder,
)
from unified_mm.data.tfds_features import PART, TOLD, choose_roles
from unified_mm.files import user_path

PREPARED = "prepared.json"  # what `unified_mm.prepare` tells of its work
_EMPTY = "empty caption"


def open_dataset(data: Any) -> TfdsSource:
    """Returns the dataset in `data.dir`, a folder of this machine or of the network.

    Raises:
      FileNotFoundError: there is no dataset.
      ValueError: the dataset is not in that format, or lacks the features that `data.tfds` names.
    """
    if not data.dir:
        raise ValueError(
            "data.source='tfds' needs data.dir: the folder with dataset_info.json, such as "
            "DIR/coco_captions/2014/1.1.0, or what unified_mm.prepare wrote"
        )
    if not is_remote(data.dir):
        return TfdsSource(user_path(data.dir, "data.dir").absolute(), data, None)
    mirror = Mirror(data.dir, cache_folder(data))
    names = [*mirror.names(), *mirror.names("annotations/")]
    mirror.fetch([name for name in names if f".{FILE_FORMAT}-" not in name])
    return TfdsSource(mirror.folder, data, mirror)


class TfdsSource(AnnotatedFolder):
    """The splits of a TFDS dataset, in its order."""

    def __init__(self, folder: Path, data: Any, mirror: Mirror | None) -> None:
        self._builder = open_builder(folder, data.dir)
        features = dict(self._builder.info.features.items())
        self._roles = choose_roles(features, data.tfds, data.dir)
        self._mirror = mirror
        prepared = (folder / PREPARED).is_file()
        told = checked_json.read(folder / PREPARED) if prepared else None
        banner = told.string("notice") if told and told.has("notice") else None
        super().__init__(folder, list(self._builder.info.splits), data, name="tfds", banner=banner)
        if prepared:
            self._max_orphans = 1.0  # some images were left out, and theirs were accepted then
        held: list[str] = []  # the features of what is more than images with captions
        if told and told.has("parts"):
            self.media = told.get("parts")
            held = [TOLD, *map(PART.format, self.media)]
            if lost := [name for name in held if name not in features]:
                fault = f"is of {', '.join(lost)}, which {FEATURES} lacks: copy or prepare it again"
                raise told.error(fault, "parts")
        self._tells = bool(held)
        self._features = feature_dict({n: features[n] for n in (*self._roles.features, *held)})

    def _build(self, split: str, sidecars: Sequence[Sidecar]) -> Manifest:
        if split not in self.splits():
            raise ValueError(
                f"{self.folder} has no split {split!r}; it has {', '.join(self.splits())}: set "
                "data.train_split and evaluation.split to two of these"
            )
        shards = self._shards(split)
        held = {"image": self._roles.image} | {name: PART.format(name) for name in self.media}
        shelves = {name: Split(self.folder, split, feature) for name, feature in held.items()}
        manifest = cached(
            self._cache,
            self._key(split, shards),
            lambda: self._read(shelves, shards),
            partial(from_json, shelves=shelves),
            to_json,
        )
        where = f"{split!r} in {self.folder}"
        records, problems = manifest.records, manifest.problems
        listed = sum(shard.records for shard in shards)
        refuse_bad(f"images of {where}", listed, len(records), problems, self._max_bad_share)
        texts = sum(len(record.texts) for record in records)
        empty = [problem for problem in problems if problem.what == _EMPTY]
        if texts or empty:
            count = texts + len(empty)
            refuse_bad(f"captions of {where}", count, texts, empty, self._max_bad_share)
        ids = {record.id for record in records}
        return with_orphans(manifest, sidecars, ids, f"the images of {where}")

    def _shards(self, split: str) -> list[Shard]:
        info = self._builder.info.splits[split]
        shards = [
            Shard(Path(path), count)
            for path, count in zip(info.filepaths, info.shard_lengths, strict=True)
        ]
        if self._mirror:
            self._mirror.fetch([shard.path.name for shard in shards])
        for shard in shards:
            if not shard.path.is_file():
                raise FileNotFoundError(
                    f"{shard.path} is missing, though {INFO} lists it: copy the dataset again"
                )
        return shards

    def _key(self, split: str, shards: Sequence[Shard]) -> str:
        """Returns a hash of all that the manifest of a split depends on."""
        stats = [(shard.path.name, shard.path.stat()) for shard in shards]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        setting = ["tfds", FORMAT, PIL.__version__, self.folder, split, list(self._roles), files]
        setting += [self.media] if self.media else []
        digest = hashlib.sha256(json.dumps(setting).encode())
        for name in (INFO, FEATURES):
            digest.update((Path(self.folder) / name).read_bytes())
        return digest.hexdigest()

    def _read(self, shelves: Mapping[str, Split], shards: Sequence[Shard]) -> Manifest:
        """Reads every example once and decodes its files completely."""
        from tqdm import tqdm

        for shard in shards:
            shard.check()
        count = sum(shard.records for shard in shards)
        split = shelves["image"].split
        with ThreadPoolExecutor() as pool:
            read = pool.map(lambda n: self._checked(shelves, n), range(count))
            found = list(tqdm(read, "checking images", count, unit="image", disable=None))
        records: dict[int | str, Record] = {}
        problems: list[Problem] = []
        for record, faults in found:
            name = f"{split}: id {record.id!r}"
            if record.id in records:
                faults = [Problem(name, "id of another example too", "left out")]
            if not any(fault.action == "left out" and fault.what != _EMPTY for fault in faults):
                records[record.id] = record
            problems += faults
        kept = tuple(records.values())
        sizes: dict[File, int] = {p: p.size for record in kept for p in record.parts.values()}
        sealed = fingerprint(kept, sizes)
        return Manifest(split, kept, self.name, self.folder, sealed, tuple(problems))

    def _checked(self, shelves: Mapping[str, Split], number: int) -> tuple[Record, list[Problem]]:
        """Returns an example as a record, with what is wrong with its files and its captions."""
        shelf, roles = shelves["image"], self._roles
        example = shelf.example(number, self._features)
        place = f"{shelf.split}[{number}]"
        told = json.loads(example[TOLD]) if self._tells else {}
        captions = [caption.strip() for caption in roles.captions_of(example, f"{shelf}[{number}]")]
        prompts = told.get("prompts", [""] * len(captions))
        texts = tuple(Text(*each) for each in zip(prompts, captions, strict=True) if each[1])
        faults = [Problem(place, _EMPTY, "left out") for caption in captions if not caption]
        data, name = example[roles.image], roles.name_of(example)
        # An empty image is none: TFDS has no other way to leave one out.
        found: dict[str, tuple[str, bytes]] = {"image": (name or place, data)} if data else {}
        found |= {
            key: (file, example[PART.format(key)]) for key, file in told.get("files", {}).items()
        }
        fault = worst(
            image_fault(file, content, name)
            if key == "image"
            else part_fault(file, self.media[key], content)
            for key, (file, content) in found.items()
        )
        parts = {
            key: Stored(shelves[key], number, file, len(content))
            for key, (file, content) in found.items()
        }
        mirrorable = roles.mirrorable_of(example) and not names_sides(texts)
        labels = tuple(told.get("labels", ()))
        record = Record(roles.id_of(example, number), parts, texts, mirrorable, labels)
        return record, ([fault] if fault else []) + faults
