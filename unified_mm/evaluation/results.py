"""What a model wrote about a split, as the results that COCO's and VQA's evaluations read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unified_mm.data.records import Image, Record, Stored
from unified_mm.evaluation.evaluate import Scores
from unified_mm.files import write_json
from unified_mm.objectives.transcription import transcript_of


def results_beside(scores: Path, prefix: str = "") -> dict[str, Path]:
    """Returns the files of captions and of answers that belong to a file of scores."""
    written = ("captions", "answers", "transcripts")
    return {what: scores.with_name(f"{prefix}{what}.json") for what in written}


def write_results(files: dict[str, Path], found: Scores, folder: str) -> None:
    """Writes the captions, the answers and the transcripts, those that there are.

    Args:
      files: by `captions`, `answers` and `transcripts`.
      found: the scores, with what was written.
      folder: of the data, within which images are named.
    """
    captions = [
        {"image_id": record.id, "file_name": file_name(record, folder), "caption": text}
        for record, text in zip(found.images, found.captions, strict=bool(found.captions))
    ]
    answers = [
        {"question_id": asked.id, "image_id": asked.image_id, "question": asked.question}
        | {"answer": text}
        for asked, text in zip(found.questions, found.answers, strict=True)
    ]
    transcripts = [
        {"id": record.id, "file_name": file_name(record, folder), "objective": name}
        | {"transcript": transcript_of(record), "heard": text}
        for name, heard in found.transcripts.items()
        for record, text in heard
    ]
    contents: dict[str, list[Any]] = {"captions": captions, "answers": answers}
    contents["transcripts"] = transcripts
    for what, content in contents.items():
        if content:
            write_json(files[what], content)


def file_name(record: Record, folder: str) -> str | None:
    """Returns the file of an example's image, or else of its first part that is one.

    Within the data's folder it is named from there on.
    """
    named = (each for each in (record.image, *record.parts.values()) if each is not None)
    image = next((each for each in named if isinstance(each, Image)), None)
    if isinstance(image, Stored):
        return image.name
    if image is None or not Path(image).is_relative_to(folder):
        return image
    return os.path.relpath(image, folder)
