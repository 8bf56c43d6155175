"""Compares runs: config, parameters, FLOPs, scores and learning curves.

    python -m unified_mm.compare runs/first runs/second
    python -m unified_mm.compare runs/first runs/second --output=comparison.html

The first run is the baseline of the others. Runs may be of different kinds, unfinished, imported or
quantised; what a run does not have is shown as a dash.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from unified_mm.cli.command import command
from unified_mm.cli.messages import new_file, say
from unified_mm.files import naming, read_json, write_atomically
from unified_mm.runs.folder import RunFolder


@command("compare", __doc__, names="runs", takes=("output",))
def main(options: argparse.Namespace) -> int:
    """Prints how the runs differ, writes the HTML page and returns the exit code.

    Raises:
      FileNotFoundError: if a folder is no run.
      ValueError: if a run is given twice, or the output file exists or cannot be written.
    """
    from unified_mm.analysis.comparison import compare, short_names, summarise
    from unified_mm.analysis.comparison_page import as_html, as_text

    output = new_file(options.output)
    folders = [RunFolder(run) for run in options.runs]
    places = [folder.path.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{folder.path} is given twice, by this name or another")
    runs = [
        summarise(folder, name, sizes_of(folder) | expected_costs(folder))
        for folder, name in zip(folders, short_names(folders), strict=True)
    ]
    found = compare(runs)
    say(as_text(found))
    if output is not None:
        with naming(f"--output={output}"):
            write_atomically(output, as_html(found).encode())
        say(f"page: {output}")
    return 0


def sizes_of(folder: RunFolder) -> dict[str, Any]:
    """Counts the parameters and FLOPs of a run's model.

    Returns:
      The counts by name, each None where they cannot be counted; the reason is then printed.

    Raises:
      FileNotFoundError: if the folder is no run.
    """
    from unified_mm.config import Config
    from unified_mm.data.text_tokenizer import TextTokenizer
    from unified_mm.default_config import defaults
    from unified_mm.training.sizes import measure_sizes

    if not folder.exists:
        raise FileNotFoundError(f"{folder.path} is no run (it has no config.json)")
    fields = folder.read_config(defaults())
    names = ("parameters", "FLOPs of a training example", "FLOPs of a generated token")
    try:
        if folder.tokenizer.is_file():  # it may be smaller than the config allows
            named = fields["data"].get("special_tokens", {})
            tokenizer = TextTokenizer.load(folder.tokenizer, **named)
            fields["data"]["vocabulary_size"] = tokenizer.vocabulary_size
        sizes = measure_sizes(Config(fields))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # A part of a model (an imported image tower), or a config of another version.
        say(f"{folder.path}: parameters and FLOPs cannot be counted: {error}")
        return dict.fromkeys(names)
    counted = (sizes.total, sizes.training_flops, sizes.token_flops)
    return dict(zip(names, counted, strict=True))


def expected_costs(folder: RunFolder) -> dict[str, int]:
    """Returns what `calibrate` found a text of a run to cost, by name; nothing where it did not.

    What it found at another step than that of the run's weights is left out, and said.
    """
    from unified_mm.runs.checkpoints import Checkpoints

    found = read_json(folder.exits) if folder.exits.exists() else {}
    place = folder.best if found.get("state") == "best" else folder.checkpoints
    if found and place.is_dir():
        with Checkpoints(place, read_only=True) as checkpoints:
            steps = checkpoints.steps()
        if steps and found.get("step") != steps[-1]:
            say(
                f"{folder.exits} is of step {found.get('step')}, and the run is at {steps[-1]}: "
                "what a text costs is left out until it is calibrated anew"
            )
            return {}
    texts = found.get("texts", {})
    return {
        f"FLOPs of a text ({kind}), {which}": flops
        for kind, found in texts.items()
        for which, flops in found.get("flops", {}).items()  # runs were calibrated before it
    }


if __name__ == "__main__":
    main(sys.argv[1:])
