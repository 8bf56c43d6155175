"""The table of a sweep: rewritten in place on a terminal, else a line for each change."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from experiments.sweeping.progress import Progress, duration
from experiments.sweeping.runs import Run

STATES = ("finished", "running", "queued", "waiting", "failed", "differs")


@dataclass
class Row:
    """One run in the table of a sweep.

    Attributes:
      run: the run.
      state: one of `STATES`.
      progress: the progress of its training.
      said: a message, such as why the run failed.
    """

    run: Run
    state: str = "waiting"
    progress: Progress = field(default_factory=Progress)
    said: str = ""

    def cells(self) -> tuple[str, str, str, str, str]:
        """Returns name, state, steps, loss and time left."""
        p = self.progress
        steps = "" if p.steps is None else f"{p.step}/{p.steps}"
        if self.state != "running":
            return self.run.name, self.state, steps if p.step else "", "", self.said
        loss = "" if p.loss is None else f"{p.loss:.3f}"
        return self.run.name, self.state, steps, loss, duration(p.seconds_left)


@dataclass
class Table:
    """A table of rows that is shown on a stream.

    Attributes:
      width: the width of the longest name.
      stream: where the table is written to.
    """

    width: int
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    _shown: int = 0
    _told: dict[str, tuple[str, int]] = field(default_factory=dict)

    def show(self, rows: Sequence[Row]) -> None:
        """Shows the rows in their present state."""
        if self.stream.isatty():
            self._redraw(rows)
        else:
            self._tell_changes(rows)

    def line(self, row: Row) -> str:
        name, state, steps, loss, rest = row.cells()
        return f"{name:<{self.width}}  {state:<9}{steps:>12}{loss:>9}  {rest}".rstrip()

    def _redraw(self, rows: Sequence[Row]) -> None:
        size = shutil.get_terminal_size()
        # One line a row, or the cursor goes up too few; all that was said comes last.
        lines = [self.line(row).partition("\n")[0][: size.columns - 1] for row in rows]
        counts = ", ".join(
            f"{count} {state}"
            for state in STATES
            if (count := sum(row.state == state for row in rows))
        )
        room = size.lines - 2
        if len(lines) > room:  # those that are done, or have not begun, are counted alone
            lines = [
                line
                for line, row in zip(lines, rows, strict=True)
                if row.state in ("running", "failed", "differs")
            ][:room]
        up = f"\x1b[{self._shown}A" if self._shown else ""
        body = "".join(f"\x1b[2K{line}\n" for line in [*lines, counts])
        self.stream.write(f"{up}\x1b[J{body}")
        self.stream.flush()
        self._shown = len(lines) + 1

    def _tell_changes(self, rows: Sequence[Row]) -> None:
        for row in rows:
            p = row.progress
            quarter = 4 * p.step // p.steps if p.steps and row.state == "running" else 0
            now = (row.state, quarter)
            if self._told.get(row.run.name, ("waiting", 0)) != now:
                print(self.line(row), file=self.stream, flush=True)
                self._told[row.run.name] = now


def final_table(rows: Sequence[Row], scores: Sequence[str]) -> str:
    """Returns the table of every run with its scores, independent of how the sweep was executed."""
    width = max(len("run"), *(len(row.run.name) for row in rows))
    heads = [score.removeprefix("single_caption/") for score in scores]
    lines = [f"{'run':<{width}}  {'state':<9}" + "".join(f"  {head}" for head in heads)]
    for row in rows:
        found = row.run.folder.read_result()["scores"] if row.state == "finished" else {}
        cells = [
            f"  {found[score]:>{len(head)}.4f}" if score in found else f"  {'':>{len(head)}}"
            for score, head in zip(scores, heads, strict=True)
        ]
        lines.append(f"{row.run.name:<{width}}  {row.state:<9}{''.join(cells)}".rstrip())
    return "\n".join(lines)
