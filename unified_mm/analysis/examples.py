"""Examples of the data that a run is scored on, for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from unified_mm.config import Config
from unified_mm.data.records import Record
from unified_mm.data.sources import Source, open_source
from unified_mm.evaluation.evaluate import captions_of, is_scored
from unified_mm.evaluation.splits import evaluated_splits
from unified_mm.inference.loaded import LoadedModel, Picture


def open_data(config: Config, split: str = "", data_dir: str = "") -> tuple[Source, str]:
    """Opens a run's data and returns its source and the split on which the run is scored.

    Args:
      config: the run's config.
      split: another split, if not ''.
      data_dir: where the data lies now, if elsewhere.

    Raises:
      FileNotFoundError, ValueError: the data or the split does not exist.
    """
    fields = config.as_dict()
    if split:
        fields["evaluation"]["split"] = split
    if data_dir:
        fields["data"]["dir"] = data_dir
    asked = Config(fields)
    source = open_source(asked.data)
    return source, evaluated_splits(asked, source)[0]


def scored_records(source: Source, split: str, count: int) -> list[Record]:
    """Returns the first `count` records of a split that have both an image and a caption."""
    return [record for record in source.manifest(split).records if is_scored(record)][:count]


def evenly_spread(total: int, count: int) -> Int[np.ndarray, " chosen"]:
    """Returns `count` indices (or all) spread evenly over `total`."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def batch_of(model: LoadedModel, records: list[Record]) -> dict[str, dict[str, Any]]:
    """Returns records as one batch, each with its first caption."""
    encode = model.task.modalities["text"].encode
    rows = [
        {**image_row(model, record.image), "text": encode("", captions_of(record)[0])}
        for record in records
    ]
    return stacked(rows)


def image_row(model: LoadedModel, image: Picture) -> dict[str, dict[str, Any]]:
    """Returns a row of the context with this image and nothing else."""
    names = model.task.model.context_names
    absent = {name: model.task.modalities[name].absent() for name in names}
    return {**absent, "image": {"pixels": model.view(image), "present": np.array(True)}}


def stacked(rows: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Returns rows as one batch."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
