"""What a model wrote about a split, as the results that COCO's and VQA's evaluations read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unified_mm.data.records import Image, StoredImage
from unified_mm.evaluation.evaluate import Scores
from unified_mm.files import write_json


def results_beside(scores: Path, prefix: str = "") -> dict[str, Path]:
    """Returns the files of captions and of answers that belong to a file of scores."""
    return {what: scores.with_name(f"{prefix}{what}.json") for what in ("captions", "answers")}


def write_results(files: dict[str, Path], found: Scores, folder: str) -> None:
    """Writes the captions and the answers, those that there are.

    Args:
      files: by `captions` and `answers`.
      found: the scores, with what was written.
      folder: of the data, within which images are named.
    """
    captions = [
        {"image_id": record.id, "file_name": file_name(record.image, folder), "caption": text}
        for record, text in zip(found.images, found.captions, strict=bool(found.captions))
    ]
    answers = [
        {"question_id": asked.id, "image_id": asked.image_id, "question": asked.question}
        | {"answer": text}
        for asked, text in zip(found.questions, found.answers, strict=True)
    ]
    contents: dict[str, list[Any]] = {"captions": captions, "answers": answers}
    for what, content in contents.items():
        if content:
            write_json(files[what], content)


def file_name(image: Image | None, folder: str) -> str | None:
    """Returns the file of an image, within the data's folder where it lies there."""
    if isinstance(image, StoredImage):
        return image.name
    if image is None or not Path(image).is_relative_to(folder):
        return image
    return os.path.relpath(image, folder)
