"""Compiling in a thread, while a run does something else."""

from __future__ import annotations

import threading
from typing import Any

import jax
from jax.sharding import Mesh

from unified_mm.parallel.mesh import shares_threads


def may_compile_beside(mesh: Mesh) -> bool:
    """Returns whether a run may compile beside what else it does.

    Processes compile in one order, and devices of one CPU share its threads with the compiler.
    """
    return jax.process_count() == 1 and not shares_threads(mesh)


class Compilation:
    """The compilation of a program in a thread.

    Args:
      lowered: the program. It is lowered before: in a thread that would take turns with whatever
        else is traced.
    """

    def __init__(self, lowered: Any) -> None:
        self._error: Exception | None = None
        # Python waits for it at its end: a process that ended meanwhile would crash.
        self._thread = threading.Thread(target=self._compile, args=(lowered,))
        self._thread.start()

    def _compile(self, lowered: Any) -> None:
        try:
            lowered.compile()
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Waits until nothing is compiled."""
        self._thread.join()

    def finish(self) -> None:
        """Waits until the program is compiled: who calls it finds it so.

        Raises:
          Exception: what the compiler raised.
        """
        self.wait()
        if self._error is not None:
            raise self._error
