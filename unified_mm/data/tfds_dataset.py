"""A TFDS dataset on disk: its description, its shards, and examples by their number.

No TensorFlow: examples are read as bytes through `builder.as_data_source`, and only the features
that are needed are deserialized. TFDS is imported when a dataset is opened.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unified_mm.data import checked_json

FILE_FORMAT = "array_record"
INFO, FEATURES = "dataset_info.json", "features.json"


class Shard(NamedTuple):
    """A file of a split, and how many examples the dataset says it holds."""

    path: Path
    records: int

    def check(self) -> None:
        """Raises ValueError if the file holds another number of examples."""
        from array_record.python import array_record_module

        reader = array_record_module.ArrayRecordReader(os.fspath(self.path))
        found = reader.num_records() if reader.ok() else 0
        if found != self.records:
            fault = f"holds {found} examples" if reader.ok() else "is damaged or cut off"
            raise ValueError(
                f"{self.path} {fault}, where {INFO} says {self.records}: copy or prepare it again"
            )
        reader.close()


@dataclass(frozen=True)
class Split:
    """The undecoded files that a feature of a split holds, by number: a `records.ByteStore`.

    Every process opens the files for itself, when it first reads.

    Attributes:
      folder: the folder of the dataset.
      split: the name of the split.
      feature: the name of the feature.
    """

    folder: str
    split: str
    feature: str

    def __str__(self) -> str:
        return f"{self.folder} {self.split}"

    def __getitem__(self, number: int) -> bytes:
        data: bytes = self.example(number, self._opened.alone)[self.feature]
        return data

    def __reduce__(self) -> tuple:
        return Split, (self.folder, self.split, self.feature)

    def example(self, number: int, features: Any) -> Mapping[str, Any]:
        """Returns the members of an example that `features` holds, its own file undecoded.

        Raises:
          ValueError: a shard cannot be read; the message names it.
        """
        opened = self._opened
        try:
            raw = opened.raw[number]
            found: Mapping[str, Any] = features.deserialize_example_np(raw, decoders=opened.skip)
        except Exception as error:  # the reader's own, and what its parser meets
            shard, position = opened.place(number)
            raise ValueError(
                f"{shard} is damaged at example {position}: {str(error).partition('; ')[0]}. Copy "
                "or prepare it again"
            ) from error
        return found

    @cached_property  # threads that meet may open it twice; one of the two is dropped
    def _opened(self) -> _Opened:
        import tensorflow_datasets as tfds

        builder = open_builder(Path(self.folder), self.folder)
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        raw = builder.as_data_source(self.split, deserialize_method=raw_bytes)
        alone = feature_dict({self.feature: builder.info.features[self.feature]})
        skip = {self.feature: tfds.decode.SkipDecoding()}
        return _Opened(raw, alone, skip, builder.info.splits[self.split])


class _Opened(NamedTuple):
    """A split that is open for reading.

    Attributes:
      raw: the serialized examples.
      alone: the feature dict of the file alone.
      skip: the decoders that leave it undecoded.
      info: TFDS' description of the split.
    """

    raw: Sequence[bytes]
    alone: Any
    skip: dict[str, Any]
    info: Any

    def place(self, number: int) -> tuple[str, int]:
        """Returns the shard of an example, and the example's number in it."""
        ends = list(itertools.accumulate(self.info.shard_lengths))
        shard = next(i for i, end in enumerate(ends) if number < end)
        start = ends[shard] - self.info.shard_lengths[shard]
        return os.fspath(self.info.filepaths[shard]), number - start


def feature_dict(members: Mapping[str, Any]) -> Any:
    """Returns a TFDS feature dict of these features alone, so that no others are deserialized."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(dict(members))


def open_builder(folder: Path, given: str) -> Any:
    """Returns TFDS' reader of a dataset that TFDS or this package prepared.

    Args:
      folder: the folder of the dataset.
      given: `data.dir`, for messages.

    Raises:
      FileNotFoundError: the folder is not a dataset.
      ValueError: the dataset is damaged, or not in `array_record` format.
    """
    import tensorflow_datasets as tfds

    for name in (INFO, FEATURES):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"data.dir={given} has no {name}{_no_dataset(folder)}")
    told = checked_json.read(folder / INFO)
    checked_json.read(folder / FEATURES)
    others = told.get("alternativeFileFormats") if told.has("alternativeFileFormats") else []
    formats = [told.get("fileFormat") if told.has("fileFormat") else "tfrecord", *others]
    if FILE_FORMAT not in formats:
        raise ValueError(
            f"data.dir={given} holds {' and '.join(map(str, formats))} files; read is "
            f"{FILE_FORMAT} alone: prepare it with file_format={FILE_FORMAT!r}, or with "
            "unified_mm.prepare"
        )
    try:
        return tfds.builder_from_directory(folder, file_format=FILE_FORMAT)
    except Exception as error:  # whatever its parsers meet
        said = " ".join(str(error).split())
        raise ValueError(
            f"data.dir={given}: {INFO} or {FEATURES} is not as TFDS writes it ({said[:200]}): copy "
            "or prepare it again"
        ) from error


def _no_dataset(folder: Path) -> str:
    """Returns the end of an error on a folder without a dataset: the datasets below it, if any."""
    below = sorted(
        os.fspath(path.parent)
        for depth in (1, 2, 3)
        for path in folder.glob("/".join(["*"] * depth + [INFO]))
    )
    if below:
        return f" and is no TFDS dataset, but there is one in {', '.join(below[:5])}"
    return (
        " and is no TFDS dataset: give the folder that TFDS prepared, or make one with python -m "
        "unified_mm.prepare"
    )
