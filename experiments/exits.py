"""Words that leave half way: how early, how sure, and how much sooner is a caption written?

    python -m unified_mm.main --config=experiments/exits.py --workdir=runs/exits
    python -m unified_mm.calibrate --run=runs/exits --tolerance=0.03
    python -m experiments.exits --run=runs/exits --output=exits.json

Eight narrow layers with the FLOPs of the recipe's four, and one exit after the fourth. Printed are
agreement and depth of the calibrated threshold on `test_composition`, what captions score with and
without it, seconds of writing (after the picture was read) in turns, one and eight at a time; and
in how many of 100 divisions of `val` a threshold that one half gave kept its tolerance on the
other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.recipe import get_config as get_recipe

FRESH = "test_composition"
TOLERANCE, ERROR, DIVISIONS = 0.02, 0.05, 100  # some thresholds cost more
TIMED, TURNS = 64, 4  # captions of a turn


def get_config() -> ConfigDict:
    """Returns the config: captions alone, for what two CPU cores train in minutes."""
    config = get_recipe("tiny")
    config.model.update({"layers": 8, "width": 96, "feed_forward": 384, "unroll": 8})
    config.model.exits = (4,)
    config.objectives.exits.weight = 1.0
    config.objectives.contrastive.weight = 0.0
    config.train.update({"optimizer": "muon", "learning_rate": 1e-2})
    config.train.update({"steps": 800, "warmup_steps": 30})
    config.evaluation.max_images = 1000
    config.evaluation.also = ()
    return config


def main() -> None:
    """Prints what was measured of a calibrated run, and keeps it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True)
    parser.add_argument("--images", type=int, default=1000, help="of each split")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    import unified_mm
    from unified_mm.benchmarks.timing import provenance
    from unified_mm.data.sources import open_source
    from unified_mm.files import write_json
    from unified_mm.inference.predictor import CAPTION

    model = unified_mm.load(given.run, exits=True)
    if CAPTION not in model.predictor.exits:
        raise SystemExit(f"{given.run} was calibrated without exits for captions")
    source = open_source(model.config.data)
    fresh, seen = (
        [record for record in source.manifest(split).records if record.has("text")][: given.images]
        for split in (FRESH, model.config.evaluation.split)
    )
    found = {
        "threshold": model.predictor.exits[CAPTION],
        **on_fresh(model, fresh),
        "writing": {rows: writing_speed(model, fresh[:TIMED], rows) for rows in (1, 8)},
        "divisions": kept_in_divisions(model, seen),
        **provenance(),
    }
    print(json.dumps(found))
    if given.output:
        write_json(given.output, found)


def on_fresh(model: Any, records: Sequence[Any]) -> dict[str, Any]:
    """Returns agreement, depth and scores on examples that nothing was fitted to."""
    from unified_mm.evaluation.caption_scores import caption_scores
    from unified_mm.evaluation.evaluate import captions_of
    from unified_mm.evaluation.exits import early_texts

    size = model.config.evaluation.batch_size
    texts = early_texts(model.predictor, records, [""] * len(records), size)
    scores = {}
    for name, predictor in (("all", model.predictor.leaving({})), ("exits", model.predictor)):
        rows = predictor.over(records, size, lambda batch: predictor.write(batch, [""] * size))  # noqa: B023
        scores[name] = caption_scores(rows, [captions_of(record) for record in records])["cider_d"]
    agreement = 1 - float(texts.losses.mean())
    return {"agreement": agreement, "depth": texts.depth, "cider_d": scores}


def writing_speed(model: Any, records: Sequence[Any], rows: int) -> dict[str, float]:
    """Returns tokens a second of writing by all layers and with the exit, and their ratio."""
    from unified_mm.inference.decoding import GREEDY
    from unified_mm.inference.predictor import inputs_of

    predictor = model.predictor
    writer = predictor.writer(predictor.task.modalities["text"].length - 1)
    ends = GREEDY.stop_ids(predictor.task.tokenizer)
    begin, write = jax.jit(writer.begin), jax.jit(writer.generate)
    text, used = predictor.prompts([""] * rows)
    room = predictor.task.modalities["text"].length - used
    took: dict[str, list[float]] = {"all": [], "exits": []}

    def turn(batches: Sequence[Any], threshold: Any) -> float:
        seconds, tokens = 0.0, 0
        for batch in batches:
            given = inputs_of(GREEDY, {**batch, "text": text}, room, ends, 0, threshold)
            state = jax.block_until_ready(begin(predictor.params, given))
            began = time.perf_counter()
            count = jax.block_until_ready(write(predictor.params, state).count)
            seconds += time.perf_counter() - began
            tokens += int(count.sum())
        return tokens / seconds

    batches = predictor.over(records, rows, lambda batch: [batch] * rows)[::rows]
    ways = {"all": None, "exits": predictor.thresholds([""] * rows, GREEDY)}
    for threshold in ways.values():
        turn(batches[:1], threshold)  # compiles
    for _ in range(TURNS):
        for name, threshold in ways.items():
            took[name].append(turn(batches, threshold))
    ratio = np.median(np.divide(took["exits"], took["all"]))
    return {**{name: float(np.median(each)) for name, each in took.items()}, "ratio": float(ratio)}


def kept_in_divisions(model: Any, records: Sequence[Any]) -> dict[str, Any]:
    """Returns how often a threshold of one half of the examples kept its tolerance on the other."""
    from unified_mm.calibrate import THRESHOLDS
    from unified_mm.evaluation.exits import early_texts
    from unified_mm.inference.calibration import calibrate
    from unified_mm.inference.predictor import CAPTION

    size = model.config.evaluation.batch_size
    losses = {
        threshold: early_texts(
            model.predictor.leaving({CAPTION: threshold}), records, [""] * len(records), size
        ).losses
        for threshold in THRESHOLDS
    }
    rng, half, chosen, kept = np.random.default_rng(0), len(records) // 2, [], 0
    for _ in range(DIVISIONS):
        order = rng.permutation(len(records))
        one, other = order[:half], order[half:]
        best = calibrate(lambda each: losses[each][one], THRESHOLDS, TOLERANCE, ERROR)  # noqa: B023
        kept += best is None or float(losses[best.threshold][other].mean()) <= TOLERANCE
        chosen.append(None if best is None else best.threshold)
    return {
        "tolerance": TOLERANCE,
        "error": ERROR,
        "kept": kept,
        "of": DIVISIONS,
        "thresholds": {str(each): chosen.count(each) for each in sorted(set(chosen), key=str)},
        "risks": {str(each): float(row.mean()) for each, row in losses.items()},
    }


if __name__ == "__main__":
    main()
