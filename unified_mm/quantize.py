"""Makes a run with int8 weights from a trained one, and measures what that costs in scores.

    python -m unified_mm.quantize --run runs/first --out runs/first_int8
    python -m unified_mm.quantize --run runs/first --out runs/first_w8a8 --activations=int8

Weights have one scale for each channel and layer, the table of token embeddings included; with
--activations=int8 products are int8 x int8 with int32 sums. Both runs are scored on the same images
of the same split. RUN is not changed. Every command accepts the new run, except training, which
needs floats; `export_weights` and `start_from` get floats back. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.config import Config
from unified_mm.files import new_folder, refuse_existing, write_json
from unified_mm.runs.checkpoints import refuse_name
from unified_mm.runs.folder import RunFolder, keeps_average


@command(
    "quantize",
    __doc__,
    needs=("run", "out"),
    takes=("weights", "activations", "split", "max_images", "data_dir"),
)
def main(options: argparse.Namespace) -> int:
    """Quantises a run, scores both runs, writes the new one and returns the exit code."""
    from unified_mm.inference.loaded import load
    from unified_mm.inference.quantization import quantized
    from unified_mm.inference.quantized_params import need_qwix, weight_bytes

    source, out = RunFolder(options.run), RunFolder(options.out).path
    refuse_existing(out)
    refuse_name(out)
    need_qwix()
    model = load(source.path)
    model.refuse_alone("quantised")
    activations = "" if options.activations == "none" else options.activations
    small = quantized(model, options.weights, activations, str(source.path))
    result = {
        **scored(model, small, options),
        "weights": {
            "before": weight_bytes(model.params),
            "after": weight_bytes(small.params),
        },
        "quantized": small.config.quantized.as_dict(),
        **where_and_when(model.config),
        "steps": model.step,
    }
    write_run(small, source, out, result)
    say(comparison(result))
    say(f"run: {out}")
    say(json.dumps(result))
    return 0


def scored(model: Any, small: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores of both models on one split, and what they were measured on.

    Raises:
      ValueError: if the split or the data does not exist.
    """
    from unified_mm.evaluation.evaluate import evaluate
    from unified_mm.objectives.captioning import Captioning

    if not (model.predictor.can_retrieve() or model.predictor.can(Captioning)):
        say("no scores: the model was trained on nothing that images and captions could score")
        return {"scores": {}, "chance": {}, "ceiling": {}, "before": {}}
    split, data = open_scored(model, options)
    name, images = split.manifest.split, len(split.manifest.records)
    found = []
    for which, each in (("as it is", model), ("quantised", small)):
        say(f"scoring {name}, {images:,} images, {which}")
        batch_size = model.config.evaluation.batch_size
        found.append(evaluate(each.predictor, split, batch_size=batch_size))
    before, after = found
    return {
        "scores": after.scores,
        "chance": after.chance,
        "ceiling": after.ceiling,
        "before": before.scores,
        "split": name,
        "images": images,
        "data": data,
    }


def open_scored(model: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Returns the split that is scored, and a description of its data."""
    from unified_mm.data.sources import open_source
    from unified_mm.evaluation.splits import evaluated_splits, open_split
    from unified_mm.training.output import framed

    fields = model.config.as_dict()
    if options.split:
        fields["evaluation"]["split"] = options.split
    if options.max_images:
        fields["evaluation"]["max_images"] = options.max_images
    if options.data_dir:
        fields["data"]["dir"] = options.data_dir
    asked = Config(fields)
    source = open_source(asked.data)
    if source.banner:
        say(framed(source.banner))
    name = evaluated_splits(asked, source)[0]
    split = open_split(asked, source, name, model.task.modalities, with_negatives=False)
    return split, {"source": source.name, "folder": source.folder, "notice": source.banner}


def where_and_when(config: Config) -> dict[str, Any]:
    """Returns device, versions, revision and seed, which every result has."""
    from unified_mm.runs.environment import device_name, revision, versions

    return {
        "device": device_name(),
        "versions": {**versions(), "qwix": metadata.version("qwix")},
        "revision": revision(),
        "seed": config.seed,
    }


def write_run(model: Any, source: RunFolder, out: Any, result: Mapping[str, Any]) -> None:
    """Writes the model's weights as a run, at the step of the model.

    Raises:
      ValueError: if `out` exists or cannot be created.
    """
    from unified_mm.runs.checkpoints import Checkpoints

    with new_folder(out) as half:
        run = RunFolder(half)
        write_json(run.config, model.config.as_dict())
        model.task.tokenizer.save(run.tokenizer)
        name = "average" if keeps_average(model.config.train) else "params"
        told = {"step": model.step, "tokenizer": run.tokenizer_digest()}
        with Checkpoints(run.checkpoints, asynchronous=False) as checkpoints:
            checkpoints.save(model.step, {name: model.params}, told)
        write_json(run.result, result)


def comparison(result: Mapping[str, Any]) -> str:
    """Returns a table of the scores before and after, with a last line on the weights' bytes."""
    lines = [f"{'score':<58}{'before':>9}{'after':>9}{'change':>9}"]
    for name, after in result["scores"].items():
        before = result["before"][name]
        lines.append(f"{name:<58}{before:>9.3f}{after:>9.3f}{after - before:>+9.3f}")
    before, after = (result["weights"][which]["all"] for which in ("before", "after"))
    floats = after - result["weights"]["after"]["int8"]
    lines.append(
        f"weights: {before:,} bytes before, {after:,} after ({after / before:.2f} of them); "
        f"{floats:,} of these are scales and what stays float32"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
