"""Records as the examples of a TFDS dataset."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unified_mm.data import images
from unified_mm.data.records import Manifest, Record, StoredImage


@dataclass(frozen=True)
class Options:
    """Options for writing a dataset.

    Attributes:
      resize: pixels that the shorter side of an image has at most; 0 keeps every file's bytes.
      quality: of the JPEG that a resized image becomes (Pillow's scale, chroma halved).
      shard_bytes: bytes of original image files that a shard has at most.
    """

    resize: int = 0
    quality: int = 95
    shard_bytes: int = 128 * 2**20


def to_example(record: Record, manifest: Manifest, options: Options) -> dict[str, Any]:
    """Returns a record as a TFDS example; without an image, the image is empty."""
    data, name = b"", ""
    if record.image is not None:
        data, name = _picture(record.image), _name(record.image, manifest.folder)
        if smaller := _resized(data, options):
            data, name = smaller, os.path.splitext(name)[0] + ".jpg"
    return {
        "image": data,
        "image/filename": name,
        "image/id": record.id,
        "captions": [{"text": text.target} for text in record.texts],
        "mirrorable": record.mirrorable,
    }


def _picture(image: str | StoredImage) -> bytes:
    return image.read() if isinstance(image, StoredImage) else Path(image).read_bytes()


def _name(image: str | StoredImage, folder: str) -> str:
    """Returns an image's name in its folder for messages, bytes that are not UTF-8 escaped."""
    name = image.name if isinstance(image, StoredImage) else os.path.relpath(image, folder)
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


def common_features(manifests: Mapping[str, Manifest]) -> Any:
    """Returns the features that hold all records, named as in TFDS' `coco_captions`.

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
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "image/id": key,
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "mirrorable": tfds.features.Scalar(np.bool_),
        }
    )


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
