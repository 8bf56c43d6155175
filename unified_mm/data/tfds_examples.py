"""Records as the examples of a TFDS dataset."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from unified_mm.data import images
from unified_mm.data.records import File, Manifest, Record, Stored, content_of
from unified_mm.data.tfds_features import PART, TOLD


@dataclass(frozen=True)
class Options:
    """Options for writing a dataset.

    Attributes:
      resize: pixels that the shorter side of an image has at most; 0 keeps every file's bytes.
      quality: of the JPEG that a resized image becomes (Pillow's scale, chroma halved).
      shard_bytes: bytes of original files that a shard has at most.
    """

    resize: int = 0
    quality: int = 95
    shard_bytes: int = 128 * 2**20


def other_parts(
    manifests: Mapping[str, Manifest], media: Mapping[str, str]
) -> dict[str, str] | None:
    """Returns what the records hold beside images: modalities, with what their files are.

    None where they hold nothing else than images with captions, not even labels or prompts.

    Args:
      manifests: of all splits.
      media: as `AnnotatedFolder` has them.
    """
    records = [record for manifest in manifests.values() for record in manifest.records]
    names = sorted({name for record in records for name in record.parts} - {"image"})
    if not names and not any(r.labels or any(text.prompt for text in r.texts) for r in records):
        return None
    return {name: media.get(name, name) for name in names}


def to_example(
    record: Record, manifest: Manifest, options: Options, parts: Mapping[str, str] | None
) -> dict[str, Any]:
    """Returns a record as a TFDS example; a part that it lacks is empty.

    `parts` is what `other_parts` returns.
    """
    data, name = b"", ""
    if record.image is not None:
        data, name = content_of(record.image), _name(record.image, manifest.folder)
        if smaller := _resized(data, options):
            data, name = smaller, os.path.splitext(name)[0] + ".jpg"
    example = {
        "image": data,
        "image/filename": name,
        "image/id": record.id,
        "captions": [{"text": text.target} for text in record.texts],
        "mirrorable": record.mirrorable,
    }
    return example if parts is None else example | _others(record, manifest, parts)


def _others(record: Record, manifest: Manifest, parts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the features of what a record holds beside an image with captions."""
    files = {name: part for name, part in record.parts.items() if name in parts}
    told = {
        "files": {name: _name(file, manifest.folder) for name, file in files.items()},
        "labels": record.labels,
        "prompts": [text.prompt for text in record.texts],
    }
    contents = {PART.format(name): b"" for name in parts}
    contents |= {PART.format(name): content_of(file) for name, file in files.items()}
    return contents | {TOLD: json.dumps(told)}


def _name(file: File, folder: str) -> str:
    """Returns a file's name in its folder for messages, bytes that are not UTF-8 escaped."""
    name = file.name if isinstance(file, Stored) else os.path.relpath(file, folder)
    return os.fsencode(name).decode(errors="backslashreplace")


def _resized(data: bytes, options: Options) -> bytes | None:
    """Returns a JPEG with shorter side `options.resize`; None for an image that is no larger."""
    if not options.resize:
        return None
    with Image.open(io.BytesIO(data)) as opened:
        if min(opened.size) <= options.resize:
            return None
    pixels = images.decode(data, at_least=options.resize)
    height, width = pixels.shape[:2]
    scale = options.resize / min(height, width)
    size = (round(width * scale), round(height * scale))
    smaller = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=options.quality)
    return file.getvalue()


def common_features(manifests: Mapping[str, Manifest], parts: Mapping[str, str] | None) -> Any:
    """Returns the features that hold all records, named as in TFDS' `coco_captions`.

    `parts` is what `other_parts` returns.

    Raises:
      ValueError: no single feature type holds all ids.
    """
    import tensorflow_datasets as tfds

    ids = [record.id for manifest in manifests.values() for record in manifest.records]
    if all(isinstance(key, int) and abs(key) < 2**63 for key in ids):
        key = tfds.features.Scalar(np.int64)
    elif all(isinstance(key, str) for key in ids):
        key = tfds.features.Text()
    else:
        raise ValueError(
            "ids of images are numbers and strings, or of more than 64 bits: write them alike"
        )
    features = {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "image/id": key,
        "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        "mirrorable": tfds.features.Scalar(np.bool_),
    }
    others = () if parts is None else (*map(PART.format, parts), TOLD)
    return tfds.features.FeaturesDict(features | {name: tfds.features.Text() for name in others})


def serializer(features: Any) -> Callable[[dict[str, Any]], bytes]:
    """Returns a deterministic `features.serialize_example`.

    Equal examples give equal bytes in every process.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    plain = ExampleSerializer(features.get_serialized_info())

    def serialized(example: dict[str, Any]) -> bytes:
        proto = plain.get_tf_example(features.encode_example(example))
        data: bytes = proto.SerializeToString(deterministic=True)
        return data

    return serialized
