"""How fast this device trains, writes and answers. One line of JSON comes last.

    python -m unified_mm.bench    # training and reading of --config=configs/coco.py

MFU is the share of the device's measured matrix-product peak that the model's own products reach
(Chowdhery et al. 2022, appendix B): 3 x the forward products of a step, nothing that is recomputed.

    python -m unified_mm.bench --inference --run=runs/first --output=bench.json

writes and trains with a run in each way that saves something, and says what it costs and what it
does to the scores; then lets many clients ask at once.

    python -m unified_mm.bench --sweep --output=sweep.json

measures attention layers of the recipe's shape: see `unified_mm.benchmarks.attention`. The plot
lies beside the file, as .svg.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from unified_mm.benchmarks.attention import draw, sweep
from unified_mm.benchmarks.training import measure
from unified_mm.commands import exit_code, new_file, say
from unified_mm.config import Config
from unified_mm.files import write_atomically, write_json
from unified_mm.models.options import TransformerOptions
from unified_mm.recipes import parse_flags, resolve
from unified_mm.runs.folder import RunFolder
from unified_mm.training.setup import prepare

CONFIG = config_flags.DEFINE_config_file("config", "configs/coco.py", "The recipe to measure.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps to time, after two that warm up.", lower_bound=2)
SWEEP = flags.DEFINE_bool("sweep", False, "Attention by backend over length, compiling by depth.")
INFERENCE = flags.DEFINE_bool("inference", False, "Writing, training and answering with a run.")
RUN = flags.DEFINE_string("run", "", "inference: the folder of a trained run.")
TOKENS = flags.DEFINE_integer("tokens", 64, "inference: of each timed text.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 32, "inference: the larger batch.", lower_bound=2)
IMAGES = flags.DEFINE_integer(
    "images", 200, "inference: of the run's split, that captions are scored on.", lower_bound=2
)
REPEATS = flags.DEFINE_integer("repeats", 8, "inference: timed runs of a row.", lower_bound=2)
OUTPUT = flags.DEFINE_string("output", "", "A new JSON file for what was measured.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise SystemExit(f"error: not a flag: {' '.join(argv[1:])}")
    if SWEEP.value and INFERENCE.value:
        raise SystemExit("error: --sweep and --inference are two benchmarks: give one of them")
    chosen = swept if SWEEP.value else inferred if INFERENCE.value else trained
    raise SystemExit(exit_code(chosen, interrupted="interrupted"))


def trained() -> int:
    """Measures training and reading, and prints."""
    logging.set_verbosity(logging.WARNING)
    output = new_file(OUTPUT.value)
    config = Config(resolve(CONFIG.value, flags.FLAGS["config"], say).to_dict())
    with tempfile.TemporaryDirectory() as folder:
        result = measure(prepare(config, RunFolder(folder), say), STEPS.value)
    for name, value in result.items():
        print(f"{name:<28}{value}")
    if output:
        write_json(output, result)
    print(json.dumps(result))
    return 0


def inferred() -> int:
    """Measures a run in each way of writing and training, and prints.

    Raises:
      ValueError: no run, or one that writes no captions; `--output` is there.
    """
    from unified_mm.benchmarks.inference import measure_inference

    logging.set_verbosity(logging.WARNING)
    output = new_file(OUTPUT.value)
    if not RUN.value:
        raise ValueError("--run: give the folder of a trained run")
    result = measure_inference(
        RUN.value,
        tokens=TOKENS.value,
        batch=BATCH.value,
        images=IMAGES.value,
        repeats=REPEATS.value,
        steps=STEPS.value,
        say=say,
    )
    if output:
        write_json(output, result)
    say(json.dumps(result))
    return 0


def swept() -> int:
    """Measures attention over length and compiling over depth, and prints.

    Raises:
      ValueError: `--output` is there, or cannot be written.
    """
    logging.set_verbosity(logging.WARNING)
    output, plot = sweep_files(OUTPUT.value)
    config = Config(resolve(CONFIG.value, flags.FLAGS["config"], say).to_dict())
    result = sweep(TransformerOptions.from_config(config.model), say)
    if output and plot:
        write_json(output, result)
        write_atomically(plot, draw(result).encode())
        say(f"wrote {output} and {plot}")
    say(json.dumps(result))
    return 0


def sweep_files(output: str) -> tuple[Path | None, Path | None]:
    """Where the sweep's numbers and its plot go; None for ''.

    Raises ValueError where either is there, cannot be written, or is no .json.
    """
    path = new_file(output)
    if path is None:
        return None, None
    if path.suffix != ".json":
        raise ValueError(f"--output={path}: must end in .json; the plot is beside it as .svg")
    return path, new_file(str(path.with_suffix(".svg")))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
