"""Runs the sweep of an ablation: `python -m experiments.sweep experiments/ablations/fusion.py`.

    python -m experiments.sweep FILE[:SIZE] --launcher=local --jobs=1
    python -m experiments.sweep FILE:base --launcher=slurm --partition=gpu --time=240 --gpus=1
    python -m experiments.sweep FILE:base --launcher=print [--jobset=IMAGE --tpu=v5e:4x4]
    python -m experiments.sweep FILE --trials=20

Runs are in runs/ablations/NAME/VARIANT-SEED; started again, the same command does what is missing.
A run that another ablation has finished is linked, not repeated. Local jobs divide the CPU's cores
among them, and the GPUs (of CUDA_VISIBLE_DEVICES, where that is set).
Further `--config.FIELD=VALUE` hold for all runs (give such a sweep a `--name` of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.sweeping.ablation import NAME, Ablation, load_ablation
from experiments.sweeping.done_elsewhere import link_what_is_done
from experiments.sweeping.jobs import Launcher
from experiments.sweeping.local import Local
from experiments.sweeping.loop import SweepStopped, carry_out, first_rows, watch
from experiments.sweeping.runs import Run, runs_of
from experiments.sweeping.table import Table, final_table
from unified_mm.cli.messages import exit_code, say
from unified_mm.files import hold, naming, user_path

RUNS = Path("runs") / "ablations"
LAUNCHERS = ("local", "slurm", "print")
# By launcher, the options that it alone reads, with their defaults.
READ_BY: dict[str, dict[str, Any]] = {
    "slurm": {"partition": "", "time": 60, "gpus": 1, "cpus": 8},
    "print": {"jobset": "", "tpu": "v5e:4x4", "claim": "runs"},
}


def main() -> None:
    # Configs are resolved here; the devices are for the runs.
    jax.config.update("jax_platforms", "cpu")
    args = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: sweep(args), interrupted="interrupted"))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; `more` of the result holds each --config.FIELD=VALUE."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("ablation", help="experiments/ablations/NAME.py, or NAME.py:SIZE")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (slurm: 0 is all)")
    parser.add_argument("--runs", default=str(RUNS), help="the folder of all sweeps")
    parser.add_argument("--name", help="the sweep's folder in it; else the ablation's name")
    parser.add_argument("--seeds", type=numbers, default=(), help="in place of the file's: 0,1")
    parser.add_argument("--only", action="append", default=[], help="a variant; may be repeated")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--trials", type=int, default=0, help="search: how many trials in all")
    parser.add_argument("--partition", help="slurm")
    parser.add_argument("--time", type=int, help="slurm: minutes before a job requeues (60)")
    parser.add_argument("--gpus", type=int, help="slurm: of each job (1)")
    parser.add_argument("--cpus", type=int, help="slurm: of each job (8)")
    parser.add_argument("--jobset", metavar="IMAGE", help="print: a manifest")
    parser.add_argument("--tpu", help="print: the manifest's slice of TPUs (v5e:4x4)")
    parser.add_argument("--claim", help="print: the volume claim that holds runs/ (runs)")
    return with_fields(parser, argv)


def numbers(text: str) -> list[int]:
    """Parses whole numbers between commas."""
    return [int(each) for each in text.split(",")]


def with_fields(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses the command line; `more` of the result holds the rest.

    Ends the process with an error if the rest is not --config.FIELD=VALUE.
    """
    args, more = parser.parse_known_args(argv)
    for each in more:
        if not each.startswith("--config.") or "=" not in each:
            parser.error(f"{each!r} is no option, nor --config.FIELD=VALUE")
    args.more = more
    return args


def complete(args: argparse.Namespace) -> None:
    """Sets the options of the launchers that are not given to their defaults.

    Raises:
      ValueError: if an option is given that nothing would read.
    """
    for launcher, options in READ_BY.items():
        for name, default in options.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif launcher != args.launcher:
                raise ValueError(f"--{name} is read by --launcher={launcher} alone")
    if args.trials < 0:
        raise ValueError(f"--trials={args.trials}: must be at least 1, or 0 for none")
    if args.trials:
        if args.launcher != "local":
            raise ValueError("--trials goes with --launcher=local: trials follow from each other")
        if args.only or args.seeds:
            raise ValueError(
                "--only and --seeds are not read beside --trials, which takes the base and its "
                "first seed; --config.FIELD=VALUE changes it"
            )


def sweep(args: argparse.Namespace) -> int:
    """Executes the command line, and returns the exit code.

    Raises:
      ValueError: if options are wrong or do not go together, or another process holds the sweep.
    """
    complete(args)
    name, ablation = load_ablation(args.ablation)
    name = args.name or name
    if not NAME.fullmatch(name):
        raise ValueError(f"--name={name}: letters, digits and . _ = - make the name of a folder")
    folder = user_path(args.runs, "--runs").absolute() / name
    try:
        if args.trials:
            from experiments.sweeping.search import search

            with only_sweep(folder):
                return search(ablation, folder, args.trials, args.jobs, args.more, args.interval)
        runs = runs_of(ablation, folder, seeds=args.seeds, only=args.only, more=args.more)
        if args.launcher == "print":
            return print_commands(runs, args)
        launcher = launcher_of(args, folder)
        with only_sweep(folder):
            return execute(runs, folder, launcher, ablation, args.interval)
    except SweepStopped as told:
        return told.exit_code


def launcher_of(args: argparse.Namespace, folder: Path) -> Launcher:
    """Returns the launcher that the command line asks for."""
    if args.launcher == "local":
        return Local(args.jobs, folder / "logs")
    from experiments.sweeping.slurm import Slurm

    return Slurm(
        folder=folder / "slurm",
        parallel=args.jobs,
        partition=args.partition,
        minutes=args.time,
        gpus=args.gpus,
        cpus=args.cpus,
    )


def execute(
    runs: list[Run], folder: Path, launcher: Launcher, ablation: Ablation, interval: float
) -> int:
    """Executes the runs of the sweep in `folder`, prints their scores and returns the exit code."""
    rows = first_rows(runs)
    link_what_is_done(rows, folder.parent)
    done = sum(row.state == "finished" for row in rows)
    say(f"{len(runs)} runs, {done} finished already")
    table = Table(max(len(run.name) for run in runs))
    watch(carry_out(rows, launcher, table), launcher, interval)
    say("")
    say(final_table(rows, ablation.scores))
    for row in rows:
        if row.state != "finished":
            say(f"\n{row.run.name} {row.state}: {row.said}")
    return 0 if all(row.state == "finished" for row in rows) else 1


def print_commands(runs: list[Run], args: argparse.Namespace) -> int:
    """Prints the commands, one a line, or the manifest, for another scheduler."""
    if args.jobset:
        from experiments.sweeping.jobset import manifests

        say(manifests(runs, image=args.jobset, tpu=args.tpu, claim=args.claim))
        return 0
    for run in runs:
        say(run.shell_line())
    return 0


@contextlib.contextmanager
def only_sweep(folder: Path) -> Iterator[None]:
    """Locks the sweep's folder for this process.

    Raises:
      ValueError: if another process holds the lock.
    """
    with contextlib.ExitStack() as stack:
        with naming(f"the sweep's folder {folder}"):
            stack.enter_context(hold(folder))
        yield


if __name__ == "__main__":
    main()
