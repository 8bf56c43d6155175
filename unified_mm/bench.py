"""Measures how fast this device trains, generates and serves. The last line printed is JSON.

    python -m unified_mm.bench    # training and data loading of --config=configs/coco.py

MFU is the share of the device's measured matrix-product peak that the model's own products reach
(Chowdhery et al. 2022, appendix B): 3 x the forward products of a step; products that are
recomputed do not count. The CPU seconds of a step are those of all threads, which other work on the
machine changes little. The loader is measured alone too: how many times as fast as training it is,
and the memory that it holds at first, halfway and at the end of `--steps` batches.

    python -m unified_mm.bench --inference --run=runs/first --output=bench.json

measures generation and training of a run with each option that saves time or memory: what it
costs, and what it changes in the scores; then the throughput with many clients at once.

    python -m unified_mm.bench --sweep --output=sweep.json

measures attention layers of the recipe's shape: see `unified_mm.benchmarks.attention`. The plot is
written next to the file, as .svg.

On a Linux CPU the command starts itself again with huge pages, as training does, unless
UNIFIED_MM_HUGE_PAGES=0.
"""

from __future__ import annotations

from unified_mm.cli.huge_pages import start_again

if __name__ == "__main__":
    start_again("unified_mm.bench")

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unified_mm.benchmarks.attention import draw, sweep
from unified_mm.benchmarks.training import measure
from unified_mm.cli.command import command
from unified_mm.cli.flags import at_least, refuse_unread
from unified_mm.cli.messages import new_file, say
from unified_mm.cli.recipes import resolve
from unified_mm.config import Config
from unified_mm.default_config import default_config, defaults
from unified_mm.files import write_atomically, write_json
from unified_mm.nn.options import TransformerOptions
from unified_mm.runs.folder import RunFolder, differences
from unified_mm.training.setup import prepare, settle_from_data

INFERENCE_FLAGS = ("run", "tokens", "batch", "max_images", "repeats")


@command(
    "bench",
    __doc__,
    takes=("config", "steps", "sweep", "inference", *INFERENCE_FLAGS, "output"),
    recipe="coco",
    tokens={"type": at_least(int, 1)},
)
def main(options: argparse.Namespace) -> int:
    """Runs the benchmark that the flags ask for, prints it and returns the exit code.

    Raises:
      ValueError: if flags do not go together, or the output file exists or cannot be written.
    """
    if options.sweep and options.inference:
        raise ValueError("--sweep and --inference are two benchmarks: give one of them")
    refuse_unread(options, dict.fromkeys(INFERENCE_FLAGS, ("inference",)))
    if options.sweep:
        return swept(options)
    output = new_file(options.output)
    result = inferred(options) if options.inference else trained(options)
    if output:
        write_json(output, result)
    say(json.dumps(result))
    return 0


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """Measures training and data loading, prints the results and returns them."""
    chosen = resolve(options.recipe, say)
    with tempfile.TemporaryDirectory() as folder:
        settle_from_data(chosen, RunFolder(folder))
        config = chosen.to_dict()
        result = measure(prepare(Config(config), RunFolder(folder), say), options.steps)
    for name, value in result.items():
        say(f"{name:<28}{value}")
    return {**result, "recipe": options.recipe.path, "sets": set_fields(config)}


def set_fields(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a config has other than the defaults, as text: what was measured is said by it.

    Where its data lies is left out.
    """
    found = differences(default_config().to_dict(), config, free=("data.dir", "data.cache_dir"))
    return {each.field: each.asked for each in found}


def inferred(options: argparse.Namespace) -> dict[str, Any]:
    """Measures generation, training and serving of a run, and returns the results.

    Raises:
      ValueError: if no run is given, or the run generates no captions.
    """
    from unified_mm.benchmarks.inference import measure_inference

    if not options.run:
        raise ValueError("--run: give the folder of a trained run")
    config = RunFolder(options.run).read_config(defaults())
    result = measure_inference(
        options.run,
        tokens=64 if options.tokens is None else options.tokens,
        batch=options.batch,
        images=options.max_images or 200,
        repeats=options.repeats,
        steps=options.steps,
        say=say,
    )
    return {**result, "sets": set_fields(config)}


def swept(options: argparse.Namespace) -> int:
    """Measures attention over sequence length and compile time over depth, and prints the results.

    Raises:
      ValueError: if the file of `--output` or its plot exists or cannot be written.
    """
    output, plot = sweep_files(options.output)
    config = resolve(options.recipe, say).to_dict()
    result = sweep(TransformerOptions.from_config(Config(config).model), say)
    result |= {"recipe": options.recipe.path, "sets": set_fields(config)}
    if output and plot:
        write_json(output, result)
        write_atomically(plot, draw(result).encode())
        say(f"wrote {output} and {plot}")
    say(json.dumps(result))
    return 0


def sweep_files(output: str) -> tuple[Path | None, Path | None]:
    """Returns the files for the sweep's numbers and its plot, both None for ''.

    Raises:
      ValueError: if either exists or cannot be written, or `output` does not end in .json.
    """
    path = new_file(output)
    if path is None:
        return None, None
    if path.suffix != ".json":
        raise ValueError(f"--output={path}: must end in .json; the plot is beside it as .svg")
    return path, new_file(str(path.with_suffix(".svg")))


if __name__ == "__main__":
    main(sys.argv[1:])
