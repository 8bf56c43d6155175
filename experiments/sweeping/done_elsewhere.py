"""Trainings that another ablation has done already: most of them share their base."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.sweeping.runs import Run, asked_config
from experiments.sweeping.table import Row
from unified_mm.commands import say
from unified_mm.runs.folder import RunFolder, differences


def link_what_is_done(rows: Sequence[Row], sweeps: Path) -> None:
    """Puts links in place of runs that are finished, field by field the same, in another sweep.

    Args:
      rows: those that wait are looked for, and are finished where one is found.
      sweeps: the folder of all sweeps.
    """
    waiting = [row for row in rows if row.state == "waiting" and not row.run.folder.path.exists()]
    if not waiting:
        return
    done = [(folder, folder.read_config()) for folder in finished_runs(sweeps)]
    for row in waiting:
        asked = asked_config(row.run)
        for folder, config in done:
            if not differences(config, asked, free=()):
                link(row.run, folder)
                row.state = "finished"
                break


def finished_runs(sweeps: Path) -> Iterator[RunFolder]:
    """The finished runs of all sweeps, links apart."""
    for path in sorted(sweeps.glob("*/*-*")):
        folder = RunFolder(path)
        if not path.is_symlink() and folder.exists and folder.finished:
            yield folder


def link(run: Run, folder: RunFolder) -> None:
    """A relative link, so that all sweeps may be moved together."""
    place = run.folder.path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(os.path.relpath(folder.path, place.parent), target_is_directory=True)
    say(f"{run.name} is the same training as {folder.path.parent.name}/{folder.path.name}")
