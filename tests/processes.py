"""Commands as processes of their own, for tests that stop or kill them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def started(environment: Mapping[str, str], *args: str) -> Iterator[subprocess.Popen]:
    """A process that is not left behind, whatever the test does."""
    with subprocess.Popen(
        args,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
