"""What a run prints and writes besides its checkpoints; of several processes one does so."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import defaults
from unified_mm.parallel.processes import first_decides, is_first, wait_for_all
from unified_mm.runs.folder import RunFolder, RunFolderError
from unified_mm.runs.metrics import MetricsWriter
from unified_mm.training.progress import Progress


class Silent:
    """The metrics and the progress of a process that is not the first: nothing comes of them."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def note(self, *given: Any) -> dict[str, float]:
        """Takes anything, and returns that nothing was measured."""
        return {}

    write = write_new = write_text = update = note

    def paused(self) -> Silent:
        """Returns itself: a block that is no different."""
        return self


@dataclass(frozen=True)
class Output:
    """The output of one of a run's processes.

    Attributes:
      folder: the run's folder.
      say: prints a line for the person at the terminal.
      writes: whether it is the first process, which alone prints and writes.
    """

    folder: RunFolder
    say: Callable[[str], None]
    writes: bool = True

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for all of this run's processes.

        Raises:
          RunFolderError: as `RunFolder.lock` does, on any process.
        """
        with ExitStack() as stack:
            failed: RunFolderError | None = None
            try:
                if self.writes:
                    stack.enter_context(self.folder.lock())
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
        if self.writes:
            self.folder.create_or_check(config, defaults())
            self.folder.set_result_aside()
            if not self.folder.tokenizer.is_file():
                tokenizer.save(self.folder.tokenizer)
        wait_for_all("run folder")
        if not self.folder.exists:
            raise RunFolderError(
                f"{self.folder.path} is not the folder that process 0 writes to: --workdir must be "
                "on a disk that all processes share"
            )

    def metrics(self, tensorboard: bool, resume_step: int | None) -> Any:
        """Returns the writer of metrics; see `MetricsWriter`."""
        if not self.writes:
            return Silent()
        folder = self.folder.tensorboard if tensorboard else None
        return MetricsWriter(self.folder.metrics, folder, resume_step=resume_step)

    def progress(self, start: int, steps: int) -> Any:
        """Returns the display of how far training is."""
        return Progress(start, steps) if self.writes else Silent()

    def write(self, work: Callable[[], None]) -> None:
        """Calls `work`, which writes into the folder, if this process writes."""
        if self.writes:
            work()


def output_of(folder: RunFolder, say: Callable[[str], None]) -> Output:
    """Returns this process's output: that of the first one, or none."""
    return Output(folder, say) if is_first() else Output(folder, lambda text: None, writes=False)


def framed(text: str, width: int = 78) -> str:
    """Returns text in a box of `#`, for what nobody may overlook."""
    lines = textwrap.wrap(text, width - 6)
    body = "\n".join(f"## {line:<{width - 6}} ##" for line in lines)
    return f"{'#' * width}\n{body}\n{'#' * width}"
