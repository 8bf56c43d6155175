"""Runs that another ablation has finished already: most ablations share their base."""

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
    """Links waiting runs to finished runs of other sweeps that have exactly the same config.

    Args:
      rows: the runs; those that wait become finished if such a run is found.
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
    """Yields the finished runs of all sweeps with their configs, without links and damaged runs."""
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
    """Makes a link that is relative, so that all sweeps can be moved together."""
    place = run.folder.path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(os.path.relpath(folder.path, place.parent), target_is_directory=True)
    name = f"{folder.path.parent.name}/{folder.path.name}"
    say(f"{run.name} is the same training as {name}, revision {revision_of(folder)}: linked")


def revision_of(folder: RunFolder) -> str:
    """Returns the git commit that a finished run was trained with."""
    return str(folder.read_result().get("revision"))[:10]
