"""Pictures inside of larger files: WebDataset tars and parquet files, read by number."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unified_mm.files import naming, write_atomically

# The field of a parquet file that holds pictures, as Hugging Face's datasets write them.
BYTES, NAME = "bytes", "path"


@dataclass(frozen=True, eq=False)
class Spans:
    """Undecoded images at known places of some files: a `records.ByteStore`.

    Attributes:
      files: the files.
      owners: for each image, the number of its file.
      starts: the byte of the file at which it begins.
      sizes: its bytes.
    """

    files: tuple[str, ...]
    owners: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def __str__(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and others"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and self.files == other.files

    def __hash__(self) -> int:
        return hash(self.files)

    def __getitem__(self, number: int) -> bytes:
        file, size = self.files[self.owners[number]], int(self.sizes[number])
        with naming(file), open(file, "rb") as opened:
            found = os.pread(opened.fileno(), size, int(self.starts[number]))
        if len(found) < size:
            raise ValueError(f"{file} is cut off: copy it again")
        return found


class Sample(NamedTuple):
    """One sample of a shard.

    Attributes:
      key: its name in the shard.
      name: the name of its picture; None where it has none.
      start, size: where the picture lies in the shard's bytes.
      texts: what is written beside it, by suffix or column.
    """

    key: str
    name: str | None
    start: int
    size: int
    texts: dict[str, Any]


class Shard(NamedTuple):
    """The samples of one file, and the file that their pictures' bytes are in."""

    file: Path
    data: Path
    samples: list[Sample]

    @property
    def stamp(self) -> list[Any]:
        """Returns what tells whether the file has changed."""
        stat = self.file.stat()
        return [str(self.file.absolute()), stat.st_size, stat.st_mtime_ns]


def spans_of(shards: Sequence[Shard]) -> Spans:
    """Returns the places of all samples of shards, in their order."""
    members = [(n, s.start, s.size) for n, shard in enumerate(shards) for s in shard.samples]
    owners, starts, sizes = np.array(members, np.int64).reshape(-1, 3).T
    return Spans(tuple(str(shard.data) for shard in shards), owners, starts, sizes)


def _kept(folder: Path, file: Path, *what: Any) -> Path:
    """Returns the path in the cache's folder of what is known of a file as it is now."""
    told = json.dumps([1, *Shard(file, file, []).stamp, *what])
    return folder / hashlib.sha256(told.encode()).hexdigest()


def open_tar(tar: Path, pictures: frozenset[str], cache: Path | None) -> Shard:
    """Returns the samples of a tar, in its order; where they lie is kept in `cache`.

    Args:
      tar: the file.
      pictures: the suffixes of pictures.
      cache: a folder; None keeps nothing.

    Raises:
      ValueError: the file is no tar, or is cut off.
    """
    kept = _kept(cache / "tars", tar) if cache else None
    if kept and kept.is_file():
        return Shard(tar, tar, [Sample(*each) for each in json.loads(kept.read_text())])
    samples = list(_read_tar(tar, pictures))
    if kept:
        with naming(f"data.cache_dir={cache}"):
            write_atomically(kept, json.dumps(samples).encode())
    return Shard(tar, tar, samples)


def _read_tar(tar: Path, pictures: frozenset[str]) -> Iterator[Sample]:
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")  # WebDataset: up to the first dot
                sample = found.setdefault(f"{folder}/{stem}".lstrip("./"), {"texts": {}})
                suffix = f".{suffix.lower()}"
                if suffix in pictures:
                    sample["image"] = (name, member.offset_data, member.size)
                elif suffix in (".txt", ".json", ".caption"):
                    content = opened.extractfile(member)
                    assert content is not None  # it is a file
                    sample["texts"][suffix] = content.read().decode()
            # What Python's reader passes over: a file that ends in the middle of a member's name.
            with tar.open("rb") as file:
                file.seek(opened.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise EOFError("it is cut off")
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{tar} cannot be read as a WebDataset tar: {error}") from error
    for key, sample in found.items():
        name, start, size = sample.get("image", (None, 0, 0))
        yield Sample(key, name, start, size, sample["texts"])


def open_parquet(file: Path, image: str, caption: str, cache: Path) -> Shard:
    """Returns the samples of a parquet file.

    A row of such a file cannot be read without its neighbours, so the pictures are laid side by
    side into a file of the cache, once.

    Args:
      file: the parquet file.
      image: the column of the pictures: bytes, or a group with `bytes` and `path`.
      caption: the column of the captions.
      cache: a folder.

    Raises:
      ValueError: the file is damaged, or the cache cannot be written.
    """
    kept = _kept(cache / "parquet", file, image, caption)
    index = kept.with_suffix(".json")
    if not (index.is_file() and kept.is_file()):
        with naming(f"data.cache_dir={cache}"):
            _lay_out(file, image, caption, kept, index)
    return Shard(file, kept, [Sample(*each) for each in json.loads(index.read_text())])


def _lay_out(file: Path, image: str, caption: str, kept: Path, index: Path) -> None:
    """Writes the pictures of a parquet file side by side, then where each of them lies."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    at = 0
    part = kept.with_suffix(f".{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            for number, row in enumerate(parquet_rows(file, [image, caption])):
                value = row[image]
                fields = value if isinstance(value, dict) else {BYTES: value}
                data, name = fields.get(BYTES) or b"", fields.get(NAME)
                shown = (name or f"{file.stem}[{number}]") if data else None
                samples.append(Sample(str(number), shown, at, len(data), {caption: row[caption]}))
                at += out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, kept)
    finally:
        part.unlink(missing_ok=True)
    write_atomically(index, json.dumps(samples).encode())


def parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a parquet file, a few at a time in memory.

    Raises:
      ValueError: the file is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(64, columns=list(columns)):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file that can be read: {error}") from error


def parquet_columns(file: Path) -> dict[str, str]:
    """Returns the types of a parquet file's columns, by name.

    Raises:
      ValueError: the file is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is no parquet file that can be read: {error}") from error
    return {field.name: str(field.type) for field in schema}
