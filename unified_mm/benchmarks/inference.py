"""The tables of `bench --inference`: generation, training and many clients, for one trained run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from unified_mm.benchmarks.generation import generation_table
from unified_mm.benchmarks.requests import request_table
from unified_mm.benchmarks.timing import memory_bandwidth, provenance
from unified_mm.benchmarks.training import training_table
from unified_mm.data.sources import open_source
from unified_mm.evaluation.splits import open_split
from unified_mm.inference.loaded import load

CLIENTS = 16
SLOTS = 8
REQUESTS_A_CLIENT = 12


def measure_inference(
    run: str,
    *,
    tokens: int,
    batch: int,
    images: int,
    repeats: int,
    steps: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the tables of generation, training and requests, with what was measured and where.

    Args:
      run: the folder of a trained run that writes captions; its data must be at hand.
      tokens: length of each timed text.
      batch: the larger of two batch sizes; the other is 1.
      images: number of images of the run's split, from the first, whose captions are scored.
      repeats: number of timed runs for each row of generation.
      steps: number of training steps for each row of training.
      say: called with each line of progress.

    Raises:
      ValueError: the run writes no captions.
    """
    model = load(run)
    model.predictor.writing_view  # noqa: B018  (refuses what does not write)
    config = model.config
    source = open_source(config.data)
    if source.banner:
        say(source.banner)
    name = config.evaluation.split
    scored = open_split(config, source, name, model.task.modalities, with_negatives=False)
    split = scored.first(images)
    records = [record for record in split.manifest.records if record.image]
    say(f"writing {tokens} tokens, captions of {len(records)} images of {split.manifest.split}:")
    bandwidth = memory_bandwidth()
    generation = generation_table(
        model,
        records,
        tokens=tokens,
        batches=(1, batch),
        repeats=repeats,
        bandwidth=bandwidth,
        say=say,
    )
    say(f"{CLIENTS} clients, texts of different lengths:")
    views = [model.view(record.image) for record in records[: 4 * SLOTS]]
    requests = request_table(
        model, views, count=REQUESTS_A_CLIENT * CLIENTS, clients=CLIENTS, slots=SLOTS, say=say
    )
    say(f"training, {steps} steps a row:")
    training = training_table(config.as_dict(), steps, say)
    return {
        "generation": generation,
        "training": training,
        "requests": requests,
        "run": Path(run).name,
        "split": split.manifest.split,
        "images": len(records),
        "tokens": tokens,
        "step": model.step,
        "data": source.name,
        "memory_bandwidth": round(bandwidth),
        **provenance(),
    }
