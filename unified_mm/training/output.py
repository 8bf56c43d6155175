"""What a run prints and writes besides its checkpoints; of several processes one does so."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, SupportsFloat

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import defaults
from unified_mm.parallel.processes import first_decides, is_first, wait_for_all
from unified_mm.runs.folder import RunFolder, RunFolderError
from unified_mm.runs.metrics import MetricsWriter
from unified_mm.training.progress import Progress


class Output:
    """The output of a run's only process, or of its first.

    Attributes:
      folder: the run's folder.
      say: prints a line for the person at the terminal.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for all of this run's processes.

        Raises:
          RunFolderError: as `RunFolder.lock` does, on any process.
        """
        with ExitStack() as stack:
            failed: RunFolderError | None = None
            try:
                self._take(stack)
            except RunFolderError as error:
                failed = error
            if not first_decides(failed is None):
                raise failed or RunFolderError(
                    f"process 0 cannot use the run in {self.folder.path}: see what it says"
                )
            yield

    def begin(self, config: Mapping[str, Any], tokenizer: TextTokenizer) -> None:
        """Starts the run in its folder, or goes on with the run there.

        Raises:
          ConfigDifference: as `RunFolder.create_or_check` does.
          RunFolderError: likewise, or the processes do not share the folder.
        """
        self._begin(config, tokenizer)
        wait_for_all("run folder")
        if not self.folder.exists:
            raise RunFolderError(
                f"{self.folder.path} is not the folder that process 0 writes to: --workdir must be "
                "on a disk that all processes share"
            )

    def metrics(self, tensorboard: bool, resume_step: int | None) -> MetricsWriter:
        """Returns the writer of metrics; see `MetricsWriter`."""
        folder = self.folder.tensorboard if tensorboard else None
        return MetricsWriter(self.folder.metrics, folder, resume_step=resume_step)

    def progress(self, start: int, steps: int) -> Progress:
        """Returns the display of how far training is."""
        return Progress(start, steps)

    def write(self, work: Callable[[], None]) -> None:
        """Calls `work`, which writes into the folder."""
        work()

    def _take(self, stack: ExitStack) -> None:
        stack.enter_context(self.folder.lock())

    def _begin(self, config: Mapping[str, Any], tokenizer: TextTokenizer) -> None:
        self.folder.create_or_check(config, defaults())
        self.folder.set_result_aside()
        if not self.folder.tokenizer.is_file():
            tokenizer.save(self.folder.tokenizer)


class NoOutput(Output):
    """The output of the other processes: nothing is printed and nothing written."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder, lambda text: None)

    def metrics(self, tensorboard: bool, resume_step: int | None) -> MetricsWriter:
        return _NoMetrics()

    def progress(self, start: int, steps: int) -> Progress:
        return _NoProgress(start, steps)

    def write(self, work: Callable[[], None]) -> None:
        pass

    def _take(self, stack: ExitStack) -> None:
        pass

    def _begin(self, config: Mapping[str, Any], tokenizer: TextTokenizer) -> None:
        pass


def output_of(folder: RunFolder, say: Callable[[str], None]) -> Output:
    """Returns this process's output: that of the first one, or none."""
    return Output(folder, say) if is_first() else NoOutput(folder)


class _NoMetrics(MetricsWriter):
    def __init__(self) -> None:
        pass

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        pass

    def write_new(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        pass

    def write_text(self, step: int, name: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _NoProgress(Progress):
    def __init__(self, start: int, steps: int) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def pause(self) -> None:
        pass

    def update(self, step: int, metrics: Mapping[str, float], batch_size: int) -> dict[str, float]:
        return {}


def framed(text: str, width: int = 78) -> str:
    """Returns text in a box of `#`, for what nobody may overlook."""
    lines = textwrap.wrap(text, width - 6)
    body = "\n".join(f"## {line:<{width - 6}} ##" for line in lines)
    return f"{'#' * width}\n{body}\n{'#' * width}"
