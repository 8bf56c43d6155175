"""Linear probes of each layer of a trained run, and the contribution of images to its captions.

    python -m unified_mm.probe --run=runs/first
    python -m unified_mm.probe --run=runs/first --of=text
    python -m unified_mm.probe --run=runs/first --images=DIR
    python -m unified_mm.probe --run=runs/first --contribution

Without --images the data is the run's own, which must be the embedded world: it knows the
attributes of the objects in its images. Probes are fitted on the training split and tested on
another. DIR holds one directory per class; every second image of each class is for testing, the
others for fitting. --contribution drops, blanks and shuffles the images of a captioning model and
measures what the captions lose. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from unified_mm.analysis import probes
from unified_mm.analysis.probes import Labelled, Target
from unified_mm.cli.command import command
from unified_mm.cli.messages import new_file, say
from unified_mm.files import naming, write_json

if TYPE_CHECKING:
    from unified_mm.inference.loaded import LoadedModel


@command(
    "probe",
    __doc__,
    needs=("run",),
    takes=("images", "of", "contribution", "split", "data_dir", "train", "asked", "output"),
)
def main(options: argparse.Namespace) -> int:
    """Probes the run, or measures what its images contribute, and returns the exit code."""
    from unified_mm.inference.loaded import load

    refuse_wrong(options)
    output = new_file(options.output)
    model = load(options.run)
    if options.contribution:
        result = taken_away(model, options)
    else:
        result = probed(model, options)
    if output is not None:
        with naming(f"--output={output}"):
            write_json(output, result)
    say(json.dumps(result))
    return 0


def refuse_wrong(options: argparse.Namespace) -> None:
    """Raises ValueError if options do not go together or are out of range."""
    if options.images:
        for name in ("contribution", "split", "data_dir"):
            if getattr(options, name):
                raise ValueError(f"--{name} is not read beside --images")
        if options.of == "text":
            raise ValueError("--of=text is not read beside --images: a class has no texts")
    if options.contribution and options.of == "text":
        raise ValueError("--of is not read beside --contribution")
    for name in ("train", "asked"):
        if getattr(options, name) < 3:
            raise ValueError(f"--{name}={getattr(options, name)}: must be 3 or more")


def probed(model: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Prints the accuracies of the probes by layer as a table, and returns them for JSON."""
    read = folder_of_classes if options.images else world
    learned, asked, data = read(model, options)
    found = probes.probe_layers(learned, asked)
    beside = {"chance": probes.chance(learned), "majority": probes.majority(learned, asked)}
    say(table({name: probes.grouped(each) for name, each in (beside | found).items()}))
    return {
        "scores": found,
        **beside,
        "train": len(learned),
        "asked": len(asked),
        "of": options.of,
        "step": model.step,
        "data": data,
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table with a line for each layer and a column for each target."""
    columns = list(next(iter(rows.values())))
    lines = [f"{'accuracy':<12}" + "".join(f"{name:>12}" for name in columns)]
    for name, row in rows.items():
        lines.append(f"{name:<12}" + "".join(f"{row[column]:>12.3f}" for column in columns))
    return "\n".join(lines)


def world(
    model: LoadedModel, options: argparse.Namespace
) -> tuple[Labelled, Labelled, dict[str, Any]]:
    """Returns features and attributes of scenes of the embedded world.

    Returns:
      The examples to fit on, those to test on, and a description of the data.

    Raises:
      ValueError: if the split to test on is the training split.
    """
    from unified_mm.analysis.examples import scored_records
    from unified_mm.analysis.layer_features import image_features, text_features
    from unified_mm.analysis.scenes import read_scenes, scene_targets
    from unified_mm.evaluation.evaluate import captions_of

    source, split = opened(model, options)
    if split == model.config.data.train_split:
        raise ValueError(f"--split={split} is what probes are fitted on: ask about another")
    parts = []
    for name, most in (
        (model.config.data.train_split, options.train),
        (split, options.asked),
    ):
        scenes = read_scenes(source.folder, name)
        records = scored_records(source, name, most)
        say(f"{options.of} features of {len(records):,} scenes of {name}")
        if options.of == "image":
            features = image_features(model, (record.image for record in records))
        else:
            features = text_features(model, [captions_of(record)[0] for record in records])
        targets = scene_targets([scenes[record.id] for record in records])
        parts.append(Labelled(features, targets))
    learned, asked = parts
    return learned, asked, {"source": source.name, "folder": source.folder, "split": split}


def opened(model: LoadedModel, options: argparse.Namespace) -> tuple[Any, str]:
    """Returns the run's data source and the split to test on."""
    from unified_mm.analysis.examples import open_data
    from unified_mm.training.output import framed

    source, split = open_data(model.config, options.split, options.data_dir)
    if source.banner:
        say(framed(source.banner))
    return source, split


def folder_of_classes(
    model: LoadedModel, options: argparse.Namespace
) -> tuple[Labelled, Labelled, dict[str, Any]]:
    """Returns features and classes of the images of `--images`.

    Returns:
      The examples to fit on, those to test on, and a description of the data.

    Raises:
      ValueError: if a class has fewer than two readable images, or fewer than three images are left
        to fit on.
    """
    from unified_mm.analysis.examples import evenly_spread
    from unified_mm.analysis.layer_features import image_features
    from unified_mm.evaluation.zero_shot import read_class_folder
    from unified_mm.search.items import shown

    with naming(f"--images={options.images}"):
        folder = read_class_folder(options.images)
    kept: list[list[int]] = [[] for _ in folder.classes]
    rows = model.read_ahead([[file] for file in folder.files])
    read = zip(folder.files, folder.class_of_file, rows, strict=True)
    for number, (file, label, (row,)) in enumerate(read):
        if isinstance(row, str):
            say(f"left out: {shown(file.relative_to(folder.path))} ({row})")
        else:
            kept[label].append(number)
    few = [name for name, numbers in zip(folder.classes, kept, strict=True) if len(numbers) < 2]
    if few:
        raise ValueError(
            f"{folder.path}: fewer than two images that can be read of {', '.join(few[:10])}: one "
            "is learned from, one asked about"
        )
    if sum((len(numbers) + 1) // 2 for numbers in kept) < 3:
        raise ValueError(f"{folder.path}: fewer than three images to learn from; add some")
    parts = []
    for start, most in ((0, options.train), (1, options.asked)):
        usable = np.sort(np.concatenate([numbers[start::2] for numbers in kept]))
        chosen = usable[evenly_spread(len(usable), most)]
        labels = np.array(folder.class_of_file)[chosen]
        features = image_features(model, (folder.files[i] for i in chosen))
        parts.append(Labelled(features, [Target("class", folder.classes, labels)]))
    learned, asked = parts
    return learned, asked, {"source": "classes", "folder": str(folder.path)}


def taken_away(model: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Prints loss and CIDEr-D with and without the image as a table, and returns them for JSON."""
    from unified_mm.analysis.contribution import contribution
    from unified_mm.analysis.examples import scored_records

    source, split = opened(model, options)
    records = scored_records(source, split, options.asked)
    batch_size = model.config.evaluation.batch_size
    found = contribution(model.predictor, records, "image", batch_size=batch_size)
    say(f"{'image':<10}{'nats a token':>28}{'lost':>28}{'CIDEr-D':>28}{'lost':>28}")
    for way, each in found.items():
        cells = (each.nats, each.nats_lost, each.cider_d, each.cider_d_lost)
        say(f"{way:<10}" + "".join(f"{cell!s:>28}" for cell in cells))
    return {
        "contribution": {way: dataclasses.asdict(each) for way, each in found.items()},
        "images": len(records),
        "step": model.step,
        "data": {"source": source.name, "folder": source.folder, "split": split},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
