"""Reports an ablation's results: `python -m experiments.report experiments/ablations/fusion.py`.

Stores the results of the finished runs of runs/ablations/NAME as
experiments/results/NAME/VARIANT-SEED.json, and writes next to them, from all results stored there:
table.md, table.csv, and the figures curves.svg, bars.svg and flops.svg. With `--kept` the runs need
not be there. `--name` and `--config.FIELD=VALUE` are those of the sweep.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.reporting.kept import RESULTS, Result, keep, read_kept
from experiments.reporting.pictures import against_flops, bars, learning_curves
from experiments.reporting.summary import as_csv, count, markdown, summarise
from experiments.sweep import RUNS, with_fields
from experiments.sweeping.ablation import Ablation, load_ablation
from experiments.sweeping.runs import finished, runs_of
from unified_mm.analysis.scaling import PowerLaw, fit_power_law
from unified_mm.cli.messages import exit_code, say
from unified_mm.files import user_path, write_atomically


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("ablation", help="experiments/ablations/NAME.py, or NAME.py:SIZE")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of all sweeps")
    parser.add_argument("--name", help="the sweep's folder in it; else the ablation's name")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--kept", action="store_true", help="only of what is kept already")
    args = with_fields(parser, sys.argv[1:])
    sys.exit(exit_code(lambda: report(args)))


def report(args: argparse.Namespace) -> int:
    """Stores the results, writes tables and figures, and returns the exit code."""
    if args.kept and args.more:
        raise ValueError(f"{args.more[0]} is not read beside --kept")
    name, ablation = load_ablation(args.ablation)
    name = args.name or name
    target = user_path(args.results, "--results") / name
    if not args.kept:
        keep_all(ablation, user_path(args.runs, "--runs").absolute() / name, args.more, target)
    write_summary(ablation, target)
    return 0


def keep_all(ablation: Ablation, folder: Path, more: list[str], target: Path) -> None:
    """Stores the result of every finished run, and prints which runs are missing.

    The seeds are those that have folders: a sweep may have been given other seeds.

    Raises:
      FileNotFoundError: if there is no sweep in the folder.
      ValueError: if a run differs from what the ablation asks.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no sweep in {folder}; carry it out, or give --kept")
    ends = {each.name.rpartition("-")[2] for each in folder.iterdir() if each.is_dir()}
    seeds = sorted(int(end) for end in ends if end.isdecimal())
    done = []
    for run in runs_of(ablation, folder, seeds=seeds, more=more):
        if finished(run):
            done.append(keep(run, ablation.scores, target))
        else:
            say(f"missing: {run.name}")
    say(f"kept {len(done)} runs in {target}")


def write_summary(ablation: Ablation, folder: Path) -> None:
    """Writes tables and figures of the results that are stored in the folder."""
    results = read_kept(folder, ablation)
    lines = summarise(ablation, results)
    names = list(ablation.all_variants())
    scores = list(dict.fromkeys(line.score for line in lines))
    for score in ablation.scores:
        if score not in scores:
            say(f"left out: no run has {score}")
    law = law_of(ablation, results)
    text = markdown(lines) + law_in_words(ablation.power_law, law)
    write_atomically(folder / "table.md", text.encode())
    write_atomically(folder / "table.csv", as_csv(lines).encode())
    pictures = {
        "curves": learning_curves(results, names),
        "bars": bars(results, lines, names),
        "flops": against_flops(results, names, scores, ablation.power_law, law),
    }
    for name, drawn in pictures.items():
        write_atomically(folder / f"{name}.svg", drawn.encode())
    say(text)
    say(f"written: {folder}")


def law_in_words(score: str, law: PowerLaw | None) -> str:
    """Returns the power law of a score as text, '' if there is none."""
    if law is None:
        return ""
    fit = "" if law.lack_of_fit is None else f" Lack of fit: p = {law.lack_of_fit:.2g}."
    return (
        f"\n`{score}` = {law.scale.value:.3g} x (FLOPs / {count(law.unit)}) ^ "
        f"-{law.exponent} + {law.floor} (95% intervals by profile likelihood).{fit}\n"
    )


def law_of(ablation: Ablation, results: list[Result]) -> PowerLaw | None:
    """Returns the ablation's power law, None if it asks for none or too few sizes have runs."""
    known = [r for r in results if ablation.power_law in r.scores]
    if len(known) < 4 or len({r.flops for r in known}) < 3:
        return None
    scores = np.array([r.scores[ablation.power_law] for r in known])
    return fit_power_law(np.array([r.flops for r in known], np.float64), scores)


if __name__ == "__main__":
    main()
