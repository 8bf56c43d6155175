"""The contents of a run's report, gathered from its folder and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from unified_mm.analysis.examples import evenly_spread
from unified_mm.analysis.report import (
    CaptionExample,
    ReportData,
    RetrievalExample,
    RuleTable,
    render_report,
)
from unified_mm.data import images
from unified_mm.evaluation.evaluate import Scores, captions_of
from unified_mm.files import read_json, write_atomically
from unified_mm.nn.attention.masks import reference_mask
from unified_mm.nn.attention.rules import RULES, MaskTable, View
from unified_mm.nn.tokens import Group, join_metadata, offset_positions, single_document
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

SHOWN_PIXELS = 192  # of a side, at the most


def write_report(
    folder: RunFolder,
    result: Mapping[str, Any],
    config: Mapping[str, Any],
    found: Scores,
    banner: str | None,
) -> None:
    """Writes `report.html`, which shows a run's scores, curves and examples in one file."""
    recorded = read_metrics(folder.metrics) if folder.metrics.is_file() else {}
    traced = read_json(folder.operations) if folder.operations.is_file() else {}
    operations = traced.get("operations", ())
    curves = {name: curve for name, curve in recorded.items() if len(curve[0]) > 1}
    data = ReportData(
        title=folder.path.name,
        banner=banner,
        result=result,
        config=config,
        curves=curves,
        retrieval=retrieval_examples(found),
        captions=caption_examples(found),
        rules={name: rule_table(name) for name in RULES},
        operations=operations,
    )
    write_atomically(folder.report, render_report(data).encode())


def retrieval_examples(found: Scores, count: int = 8, shown: int = 6) -> tuple:
    """Returns the first captions of evenly spread images, each with the pictures found for it."""
    if found.image_embeddings is None:
        return ()
    first = np.flatnonzero(np.diff(found.image_of_text, prepend=-1))
    examples = []
    for text in first[evenly_spread(len(first), count)].tolist():
        order = np.argsort(-(found.image_embeddings @ found.text_embeddings[text]), kind="stable")
        best = order[:shown].tolist()
        examples.append(
            RetrievalExample(
                found.texts[text],
                [picture(found, image) for image in best],
                [bool(image == found.image_of_text[text]) for image in best],
            )
        )
    return tuple(examples)


def caption_examples(found: Scores, count: int = 12) -> tuple:
    """Returns evenly spread images with what people and what the model wrote."""
    if not found.captions:
        return ()
    shown = [number for number, record in enumerate(found.images) if record.image]
    chosen = [shown[each] for each in evenly_spread(len(shown), count)]
    return tuple(
        CaptionExample(
            picture(found, image), tuple(captions_of(found.images[image])), found.captions[image]
        )
        for image in chosen
    )


def picture(found: Scores, image: int) -> np.ndarray:
    """Returns a scored image [height, width, 3], uint8, no larger than the page shows it."""
    path = found.images[image].image
    assert path is not None  # `evaluate` scores images that are there
    pixels = images.decode(path, at_least=SHOWN_PIXELS)
    side = min(SHOWN_PIXELS, *pixels.shape[:2])
    return images.evaluation_view(pixels, side)


def rule_table(name: str) -> RuleTable:
    """Returns the mask of a rule over a small picture and a short text."""
    groups = (Group("image", "image", 4), Group("text", "text", 5))
    start, parts = 0, []
    for group in groups:
        part = single_document(jnp.ones((1, group.length), bool), group)
        parts.append(offset_positions(part, {}, start))
        start += group.length
    tokens = join_metadata(parts)
    mask = reference_mask(MaskTable((View("text", name),)), tokens, tokens)[0]
    labels = [f"{group.name} {i + 1}" for group in groups for i in range(group.length)]
    return RuleTable(labels, np.asarray(mask))
