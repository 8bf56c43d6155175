"""The command; see the package."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import experiments.accelerator as package
from experiments.accelerator.schedule import Part, Results, measure_rows, run_parts
from unified_mm.costs.memory_share import said, with_share
from unified_mm.registry import resolve

HOME = "experiments.accelerator"
PARTS = (
    Part("machine", 4, f"{HOME}.training:machine"),
    Part("large", 30, f"{HOME}.training:large"),
    Part("turns", 22, f"{HOME}.turns:turns"),
    Part("checks", 14, f"{HOME}.checks:checks"),
    Part("decoding", 12, f"{HOME}.decoding:decoding"),
    Part("ladder", 14, f"{HOME}.training:ladder"),
    Part("loader", 5, f"{HOME}.world:loader"),
    Part("world", 24, f"{HOME}.world:world"),
)
ALONE = 0.92  # of a card's memory, which jax has alone here

say = functools.partial(print, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the values of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.accelerator",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder of accelerator.json")
    parser.add_argument("--work", type=Path, help="folder of runs, scenes, programs; OUT-work")
    parser.add_argument("--shrunk", action="store_true", help="tiny shapes, to rehearse on a CPU")
    parser.add_argument("--pack", type=Path, help="fill this folder with what must be carried")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.pack is None):
        parser.error("give --out=FOLDER to measure, or --pack=FOLDER to gather what is carried")
    if options.out:
        options.work = (options.work or Path(f"{options.out.resolve()}-work")).resolve()
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs all parts, or one, or packs; returns the exit code."""
    options = parse(arguments)
    if options.pack:
        from experiments.accelerator.carried import pack

        return pack(options.pack, say)
    results = Results(options.out / "accelerator.json")
    if options.part:
        return one_part(options, results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # parts end first
    if not said(os.environ):
        os.environ.update(with_share({}, ALONE))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{options.work / 'programs'}")

    def command(part: Part, seconds: float) -> list[str]:
        more = [f"--part={part.name}", f"--seconds={seconds:.0f}"]
        return [sys.executable, "-m", HOME, *arguments, *more]

    done = run_parts(PARTS, results, 60 * options.minutes, command, say)
    say(f"{'all parts are done' if done else 'not all parts are done'}: {options.out}")
    return 0 if done else 1


def one_part(options: argparse.Namespace, results: Results) -> int:
    """Measures the rows of one part that are missing, and returns its exit code."""
    from experiments.accelerator.scale import FULL, SHRUNK, Setting

    (part,) = (part for part in PARTS if part.name == options.part)
    rows = resolve("part", part.rows, {})
    setting = Setting(SHRUNK if options.shrunk else FULL, results, options.work)
    return measure_rows(part.name, rows(setting), results, options.seconds, say)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
