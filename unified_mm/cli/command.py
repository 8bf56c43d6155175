"""A command of `python -m unified_mm.NAME`: its help, its flags and what it does, as one value."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from unified_mm.cli.flags import parse
from unified_mm.cli.messages import end_with
from unified_mm.cli.programs import keep_programs


@dataclass(frozen=True)
class Command:
    """A command; called with the arguments as typed, it ends the process with its exit code.

    Attributes:
      name: the name in `python -m unified_mm.NAME`.
      doc: its help.
      work: does what the options ask for, and returns the exit code.
      flags: which flags it reads, as keyword arguments of `flags.parse`.
      interrupted: what is said where Ctrl-C ends it.
    """

    name: str
    doc: str | None
    work: Callable[[argparse.Namespace], int]
    flags: Mapping[str, Any]
    interrupted: str

    def options_of(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the values of the command's flags."""
        return parse(self.name, self.doc, arguments, **self.flags)

    def __call__(self, arguments: Sequence[str]) -> NoReturn:
        """Runs the command, and ends the process."""

        def run() -> int:
            options = self.options_of(arguments)
            keep_programs()
            return self.work(options)

        end_with(run, interrupted=self.interrupted)


def command(
    name: str, doc: str | None, *, interrupted: str = "interrupted", **flags: Any
) -> Callable[[Callable[[argparse.Namespace], int]], Command]:
    """Returns a decorator that makes a function of the options a command."""
    return lambda work: Command(name, doc, work, flags, interrupted)
