"""Writes examples as a TFDS dataset in `array_record` format, without TensorFlow.

Shards are written one by one into `.NAME.preparing` beside the target folder, each under a
temporary name until it is complete, and the folder is renamed last. So the target folder is
always complete, and a command that was killed resumes with the first shard that is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL

from unified_mm.data import coco
from unified_mm.data.layouts import WHOLE
from unified_mm.data.manifest import summary
from unified_mm.data.records import File, Manifest, Record, Stored
from unified_mm.data.sources import AnnotatedFolder
from unified_mm.data.tfds_dataset import FILE_FORMAT
from unified_mm.data.tfds_examples import (
    Options,
    common_features,
    other_parts,
    serializer,
    to_example,
)
from unified_mm.data.tfds_source import PREPARED
from unified_mm.files import LOCK, hold, naming, read_json, sha256, write_atomically, write_json

VERSION = "1.0.0"  # of the dataset, as TFDS wants one
NOTICE = (
    "THIS DATASET IS THE EMBEDDED WORLD: small rendered scenes of spheres, cubes and cylinders "
    "with generated captions. Its scores say nothing about photographs."
)
MADE = "THIS DATASET, {!r}, WAS MADE BY THIS PACKAGE: its scores say nothing about the world."
LARGEST = 2**31 - 2**20  # bytes of an example's files: a message of protocol buffers ends at 2**31


def write_dataset(
    source: AnnotatedFolder, out: Path, options: Options, say: Callable[[str], None]
) -> None:
    """Writes all splits of a source, with questions and foils; resumes an unfinished dataset.

    Records keep their order, and what training leaves out is left out.

    Args:
      source: the data.
      out: the folder to be made.
      options: how images and shards are written.
      say: gets messages for the user.

    Raises:
      FileNotFoundError, ValueError: training refuses the data too; `out` holds something else, or
        was begun with other data or options; a file cannot be written; another process is writing
        the same dataset.
    """
    manifests = {split: source.captioned(split) for split in source.splits()}
    for manifest in manifests.values():
        say(summary(manifest))
    if options.resize and not any(r.image for m in manifests.values() for r in m.records):
        raise ValueError(f"--resize is of pictures, and {source.folder} has none: leave it out")
    plan = _plan(source, manifests, options)
    if os.path.lexists(out):
        _refuse_other(out, plan, "exists and is not overwritten: name a new folder")
        say(f"{out} is prepared already, from the same data with the same options")
        return
    work = out.with_name(f".{out.name}.preparing")
    with naming(f"--out={out}"), hold(work):
        if (work / PREPARED).is_file():
            _refuse_other(work, plan, "was begun with other data or options: delete it")
            say(f"going on in {work}")
        write_json(work / PREPARED, plan)
        _write_shards(work, manifests, plan, options)
        _write_beside(work, source)
        _write_metadata(work, manifests, plan)
        (work / LOCK).unlink()
        os.rename(work, out)


def progress(out: Path) -> str:
    """Returns a message that says how far an unfinished dataset came."""
    work = out.with_name(f".{out.name}.preparing")
    plan = read_json(work / PREPARED) if (work / PREPARED).is_file() else {"splits": {}}
    shards = sum(len(split["shards"]) for split in plan["splits"].values())
    whole = sum(1 for _ in work.glob(f"[!.]*.{FILE_FORMAT}-*"))
    return f"{whole} of {shards} shards are whole in {work}"


def _plan(
    source: AnnotatedFolder, manifests: Mapping[str, Manifest], options: Options
) -> dict[str, Any]:
    """Returns all that determines the written bytes, as plain JSON values."""
    for split, manifest in manifests.items():
        if not re.fullmatch(r"[\w-]+", split):
            raise ValueError(
                f"the split {split!r} of {source.folder} has a name that TFDS cannot take: rename "
                "its files to letters, digits, underscores and hyphens"
            )
        if split == WHOLE:
            raise ValueError(
                f"{source.folder} has files that tell no split, and TFDS calls all splits together "
                f"{WHOLE!r}: move them into a folder of a split, such as train"
            )
        _refuse_unheld(manifest)
        if source.questions(split) and not coco.has_questions(source.folder, split):
            raise ValueError(
                f"the questions of {split!r} are in lists of {source.folder} that such a dataset "
                "does not hold: train on the folder itself"
            )
    beside = {
        name: sha256(file)
        for split in manifests
        for name, file in coco.files_beside(source.folder, split).items()
    }
    encoding = {**dataclasses.asdict(options), "pillow": PIL.__version__}
    parts = other_parts(manifests, source.media)
    return {
        "format": 1,
        "name": source.name,
        "notice": _notice(source),
        "encoding": encoding if options.resize else None,
        "splits": {
            split: {
                "fingerprint": manifest.fingerprint,
                "shards": _shard_lengths(manifest.records, options.shard_bytes),
            }
            for split, manifest in manifests.items()
        },
        "beside": beside,
        **({} if parts is None else {"parts": parts}),
    }


def _notice(source: AnnotatedFolder) -> str | None:
    """Returns what nobody may overlook about the data that is written."""
    if not source.banner or source.name == "tfds":
        return source.banner
    return NOTICE if source.name == "world" else MADE.format(source.name)


def _refuse_unheld(manifest: Manifest) -> None:
    """Raises ValueError for records with a part that is no file, or with files too large."""
    for record in manifest.records:
        where = f"example {record.id!r} of {manifest.folder}"
        for name, part in record.parts.items():
            if not isinstance(part, File):
                raise ValueError(f"{where}: its {name} is no file, and such a dataset holds files")
        if (size := _size(record)) > LARGEST:
            raise ValueError(
                f"{where} has files of {size:,} bytes, and an example of such a dataset holds "
                f"{LARGEST:,}: train on the folder itself"
            )


def _refuse_other(folder: Path, plan: Mapping[str, Any], otherwise: str) -> None:
    """Raises ValueError unless a folder holds what is planned, or its beginning."""
    found = read_json(folder / PREPARED) if (folder / PREPARED).is_file() else {}
    if found != json.loads(json.dumps(plan)):
        other = ", ".join(key for key in plan if found and found.get(key) != plan[key])
        raise ValueError(f"{folder} {otherwise}{f' (its {other} differ)' if other else ''}")


def _shard_lengths(records: Sequence[Record], shard_bytes: int) -> list[int]:
    """Returns how many records each shard takes, in their order."""
    lengths, filled = [0], 0
    for record in records:
        size = _size(record)
        if lengths[-1] and filled + size > shard_bytes:
            lengths.append(0)
            filled = 0
        lengths[-1] += 1
        filled += size
    return lengths


def _size(record: Record) -> int:
    return sum(
        part.size if isinstance(part, Stored) else os.path.getsize(part)
        for part in record.parts.values()
    )


def _write_shards(
    work: Path, manifests: Mapping[str, Manifest], plan: Mapping[str, Any], options: Options
) -> None:
    """Writes the shards that are missing, in order."""
    from tqdm import tqdm

    parts = plan.get("parts")
    serialized = serializer(common_features(manifests, parts))
    total = sum(len(manifest.records) for manifest in manifests.values())
    with (
        tqdm(total=total, unit="example", disable=None) as bar,
        ThreadPoolExecutor() as pool,
    ):
        for split, manifest in manifests.items():
            lengths = plan["splits"][split]["shards"]
            remaining = iter(manifest.records)
            for number, length in enumerate(lengths):
                records = list(itertools.islice(remaining, length))
                path = _template(work, plan["name"], split).sharded_filepath(
                    shard_index=number, num_shards=len(lengths)
                )
                if not path.exists():
                    made = pool.map(lambda r, m=manifest: to_example(r, m, options, parts), records)
                    _write_shard(Path(path), map(serialized, made), length)
                bar.update(length)


def _write_shard(path: Path, examples: Iterable[bytes], count: int) -> None:
    """Writes a shard, which gets its name once it is on disk and holds all its examples."""
    from array_record.python import array_record_module

    temporary = path.with_name(f".{path.name}.tmp")
    with _said_by_writer(temporary):
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        try:
            for example in examples:
                writer.write(example)
        finally:
            writer.close()
        reader = array_record_module.ArrayRecordReader(os.fspath(temporary))
        found = reader.num_records()
        reader.close()
    if found != count:
        raise ValueError(f"{temporary} holds {found} of {count} examples: is the disk sound?")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _said_by_writer(path: Path) -> Iterator[None]:
    """Turns an error of the library that writes shards into a ValueError that names the file."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be written: {str(error).partition(';')[0]}") from error


def _write_beside(work: Path, source: AnnotatedFolder) -> None:
    """Copies the files of questions and foils."""
    for split in source.splits():
        for name, file in coco.files_beside(source.folder, split).items():
            write_atomically(work / "annotations" / name, file.read_bytes())


def _write_metadata(work: Path, manifests: Mapping[str, Manifest], plan: Mapping[str, Any]) -> None:
    """Writes the metadata of the dataset for TFDS, over any that are there."""
    import tensorflow_datasets as tfds

    parts = plan.get("parts")
    infos = []
    for split in manifests:
        template = _template(work, plan["name"], split)
        lengths = plan["splits"][split]["shards"]
        paths = template.sharded_filepaths(len(lengths))
        size = sum(path.stat().length for path in paths)
        infos.append(tfds.core.SplitInfo(split, lengths, size, template))
    tfds.folder_dataset.write_metadata(
        data_dir=work,
        features=common_features(manifests, parts),
        split_infos=infos,
        version=VERSION,
        check_data=False,
        description=f"{'Examples' if parts else 'Images'} with captions, written by "
        "unified_mm.prepare." + (f" {plan['notice']}" if plan["notice"] else ""),
    )


def _template(work: Path, name: str, split: str) -> Any:
    """Returns TFDS' template for the names of a split's shards."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=work, dataset_name=name, split=split, filetype_suffix=FILE_FORMAT
    )
