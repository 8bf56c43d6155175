"""A whole run: training, scoring, and the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from unified_mm.evaluation.evaluate import Scores, evaluate
from unified_mm.inference.predictor import Predictor
from unified_mm.runs.environment import device_name, or_warn, revision, versions
from unified_mm.task import parameter_counts
from unified_mm.training.loop import keep_best, train
from unified_mm.training.notices import cut_share
from unified_mm.training.output import Output
from unified_mm.training.phases import training_flops
from unified_mm.training.setup import Setup
from unified_mm.training.state import TrainState, evaluation_params


def train_and_score(
    setup: Setup, output: Output, *, traced: int = 0
) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Trains to the end, then scores every split; `traced` is as in `train`.

    Returns:
      The contents of `result.json`, and the scores of each split.
    """
    predictor = Predictor(setup.task, None, setup.mesh)
    state, seconds = train(setup, output, predictor, traced=traced)
    began = time.perf_counter()
    found = score_splits(setup, state, output, predictor.at(evaluation_params(state)))
    return summarise(setup, found, seconds + time.perf_counter() - began), found


def score_splits(
    setup: Setup, state: TrainState, output: Output, predictor: Predictor
) -> dict[str, Scores]:
    """Scores each split; the scores of `evaluation.split` count for `best/`."""
    options = setup.options
    found = {}
    step = options.train.steps
    with output.metrics(options.logging.tensorboard, resume_step=step) as metrics:
        for name, split in setup.splits.items():
            output.say(f"scoring {name}: {len(split.manifest.records)} images")
            found[name] = evaluate(predictor, split, batch_size=options.evaluation.batch_size)
            for warning in found[name].warnings:
                output.say(f"WARNING: {warning}")
            # A run that was killed while it scored comes here again.
            metrics.write_new(step, {f"{name}/{k}": v for k, v in found[name].scores.items()})
    value = found[options.evaluation.split].scores.get(setup.best_by)
    if value is not None and options.evaluation.every:
        told = {"step": step, "data_source": setup.source.name}
        keep_best(setup, state, step, value, told | {"tokenizer": setup.folder.tokenizer_digest()})
    return found


def summarise(setup: Setup, found: Mapping[str, Scores], seconds: float) -> dict[str, Any]:
    """Returns the contents of `result.json`."""
    return {
        **{kind: joined(found, kind, setup) for kind in ("scores", "chance", "ceiling")},
        **found[setup.options.evaluation.split].said,
        "data": {
            "source": setup.source.name,
            "folder": setup.source.folder,
            "notice": setup.source.banner,
            "fingerprint": setup.fingerprint,
            "cut_share": round(cut_share(setup.task, setup.train)[0], 4),
            "counts": {
                setup.train.split: len(setup.train.records),
                **{name: len(split.manifest.records) for name, split in setup.splits.items()},
            },
        },
        "device": device_name(),
        "versions": versions(),
        "revision": revision(),
        "seed": setup.options.seed,
        "state": "last",
        "steps": setup.options.train.steps,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter_counts(setup.phases[-1].abstract.params).values()),
        "flops": or_warn("its FLOPs", lambda: run_flops(setup)),
    }


def run_flops(setup: Setup) -> int:
    """Returns the FLOPs of all steps."""
    return sum((phase.stop - phase.start) * training_flops(phase) for phase in setup.phases)


def joined(found: Mapping[str, Scores], kind: str, setup: Setup) -> dict[str, float]:
    """Returns the scores of all splits, but of `evaluation.split` as `split/name`."""
    main = setup.options.evaluation.split
    return {
        name if split == main else f"{split}/{name}": value
        for split, scores in found.items()
        for name, value in getattr(scores, kind).items()
    }
