"""Trainings that another ablation has done already: most of them share their base."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeping.runs import Run, asked_config
from experiments.sweeping.table import Row
from unified_mm.cli.messages import say
from unified_mm.default_config import defaults
from unified_mm.runs.folder import RunFolder, RunFolderError, differences


def link_what_is_done(rows: Sequence[Row], sweeps: Path) -> None:
    """Puts links in place of runs that are finished, field by field the same, in another sweep.

    Args:
      rows: those that wait are looked for, and are finished where one is found.
      sweeps: the folder of all sweeps.
    """
    for row in rows:
        place = row.run.folder.path
        if place.is_symlink() and not place.exists():
            place.unlink()  # what it led to was removed
    waiting = [row for row in rows if row.state == "waiting" and not row.run.folder.path.exists()]
    if not waiting:
        return
    done = list(finished_runs(sweeps))
    for row in waiting:
        asked = asked_config(row.run)
        for folder, config in done:
            if not differences(config, asked, free=()):
                link(row.run, folder)
                row.state = "finished"
                break


def finished_runs(sweeps: Path) -> Iterator[tuple[RunFolder, dict[str, Any]]]:
    """The finished runs of all sweeps with their configs, links and damaged ones apart."""
    for path in sorted(sweeps.glob("*/*-*")):
        if path.is_symlink():
            continue
        try:
            folder = RunFolder(path)
            if folder.exists and folder.finished:
                folder.read_result()
                yield folder, folder.read_config(defaults())
        except RunFolderError as error:
            say(f"passed over: {error}")


def link(run: Run, folder: RunFolder) -> None:
    """A relative link, so that all sweeps may be moved together."""
    place = run.folder.path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(os.path.relpath(folder.path, place.parent), target_is_directory=True)
    name = f"{folder.path.parent.name}/{folder.path.name}"
    say(f"{run.name} is the same training as {name}, revision {revision_of(folder)}: linked")


def revision_of(folder: RunFolder) -> str:
    """The code's revision that a finished run had."""
    return str(folder.read_result().get("revision"))[:10]
