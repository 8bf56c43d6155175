"""Classifies a folder of images, or of other items, by the names of their classes (zero-shot).

    python -m unified_mm.zero_shot --run runs/first --images DIR
    python -m unified_mm.zero_shot --run runs/first --images DIR --template "a photo of a {}."
    python -m unified_mm.zero_shot --run runs/tones --images DIR --of tone

DIR holds one directory per class, with its name. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys

from unified_mm.cli.command import command
from unified_mm.cli.flags import ANY_MODALITY
from unified_mm.cli.messages import new_file, say, score_table
from unified_mm.files import naming, write_json


@command(
    "zero_shot",
    __doc__,
    needs=("run", "images"),
    takes=("of", "template", "output", "max_bad_share"),
    of=ANY_MODALITY,
)
def main(options: argparse.Namespace) -> int:
    """Scores the run on the folder, prints the scores and returns the exit code."""
    from unified_mm.evaluation.zero_shot import classify_folder, read_class_folder
    from unified_mm.inference.classes import filled, templates_of
    from unified_mm.inference.loaded import load

    output = new_file(options.output)
    of, templates = options.of, options.template or list(templates_of(options.of))
    filled(templates, [""])  # says what is wrong before a model is loaded
    model = load(options.run)
    with naming(f"--images={options.images}"):
        folder = read_class_folder(options.images, of=of, suffixes=model.in_files(of).suffixes)
    say(f"{len(folder.files):,} {folder.of}s of {len(folder.classes):,} classes in {folder.path}")
    if folder.others:
        say(
            f"passed over: {folder.others:,} files that are no {folder.of}s or lie outside the "
            "classes"
        )
    found = classify_folder(model, folder, templates=templates, max_bad_share=options.max_bad_share)
    for problem in found.problems:
        say(f"left out: {problem.file} ({problem.what})")
    if found.long:
        say(found.long)
    if found.texts_cut:
        say(
            f"WARNING: {found.texts_cut} of {found.texts} filled templates are longer than the "
            "model reads and were cut; shorter templates may score higher"
        )
    result = {
        "scores": found.scores,
        "chance": found.chance,
        "ceiling": {},
        "images": found.images,
        "left_out": [{"file": p.file, "what": p.what} for p in found.problems],
        "classes": list(folder.classes),
        "templates": templates,
        "texts_cut": found.texts_cut,
        "of": of,
        "step": model.step,
        "data": {"source": "classes", "folder": str(folder.path)},
    }
    say(score_table(result))
    if output is not None:
        with naming(f"--output={output}"):
            write_json(output, result)
    say(json.dumps(result))
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
