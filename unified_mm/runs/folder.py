"""The run folder: where everything lies, its config, and the lock that keeps a run to one process.

Its files: config.json, tokenizer.json, checkpoints/, best/, metrics.jsonl, tensorboard/,
result.json (written last: the run is finished) and report.html.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What may change between two commands on one run: none of it changes what the run computes at a
# step. The data behind another `data.dir` is compared by its fingerprint, not by its place.
FREE_FIELDS = (
    "train.steps",
    "mesh.*",
    "logging.*",
    "checkpoint.*",
    "data.dir",
    "data.cache_dir",
    "data.workers",
    "data.threads",
    "workdir",
)

_ABSENT = object()


class RunFolderError(RuntimeError):
    """The folder cannot be used as a run."""


class RunLocked(RunFolderError):
    """Another process holds the run."""


class ConfigDifference(ValueError):
    """The run in the folder was started with another config than the one asked for."""


@dataclass(frozen=True)
class Difference:
    """One config field by its dotted name, as text: what the run has and what is asked."""

    field: str
    run: str
    asked: str

    def __str__(self) -> str:
        return f"{self.field}: run has {self.run}, command asks {self.asked}"


class RunFolder:
    """Paths of a run and the few operations on the folder as a whole. Nothing is created here."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.result = self.path / "result.json"
        self.report = self.path / "report.html"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run is finished: `result.json` is written last."""
        return self.result.is_file()

    def create_or_check(self, config: Mapping[str, Any]) -> bool:
        """Starts the run with `config`, or checks that the run here may go on with it.

        Fields that are free to change (`FREE_FIELDS`) are taken over into `config.json`.
        Returns whether the run is new. Raises `ConfigDifference` that lists every other
        difference, `RunFolderError` where the folder holds something else; neither writes.
        """
        new = self.check(config)
        if new or read_json(self.config) != _as_json(config):
            write_json(self.config, config)
        return new

    def check(self, config: Mapping[str, Any]) -> bool:
        """As `create_or_check`, and writes nothing."""
        self._refuse_foreign_folder()
        if not self.exists:
            return True
        found = differences(read_json(self.config), _as_json(config))
        if found:
            raise ConfigDifference(self._explain(found))
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process. Raises `RunLocked`, naming the process that has it.

        A POSIX record lock: the kernel frees it however the process ends, and workers that it
        forked do not keep it. It does not tell two holders within one process apart.
        """
        import fcntl

        self._refuse_foreign_folder()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise RunLocked(
                    f"process {file.read().strip() or '?'} is at work on the run in {self.path}; "
                    "wait until it ends, or choose another --workdir"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _refuse_foreign_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a folder; choose another --workdir")
        if self.exists or not self.path.exists():
            return
        # A process killed in its first moments leaves its lock or a temporary file, no more.
        foreign = sorted(p.name for p in self.path.iterdir() if not _is_ours(p.name))
        if foreign:
            raise RunFolderError(
                f"{self.path} holds files ({', '.join(foreign[:5])}) but no run (no config.json); "
                "choose a new or empty folder as --workdir"
            )

    def _explain(self, found: tuple[Difference, ...]) -> str:
        lines = "\n".join(f"  {difference}" for difference in found)
        return (
            f"the run in {self.path} has another config than this command asks for:\n{lines}\n"
            "Choose another --workdir for a new run, or give the run's own values to go on with "
            f"it. Only these may change within a run: {', '.join(FREE_FIELDS)}."
        )


def differences(
    run: Mapping[str, Any], asked: Mapping[str, Any], free: tuple[str, ...] = FREE_FIELDS
) -> tuple[Difference, ...]:
    """Fields in which two nested configs differ, sorted by dotted name.

    `free` holds patterns of names that are passed over, as `fnmatch` reads them ('mesh.*').
    """
    left, right = _flat(_as_json(run)), _flat(_as_json(asked))
    return tuple(
        Difference(field, _show(left.get(field, _ABSENT)), _show(right.get(field, _ABSENT)))
        for field in sorted(left.keys() | right.keys())
        if not _same(left.get(field, _ABSENT), right.get(field, _ABSENT))
        and not any(fnmatch.fnmatchcase(field, pattern) for pattern in free)
    )


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, atomically: a reader sees the old file or the new one, whole.

    Raises ValueError or TypeError, with the file's name, where JSON cannot hold the value
    (NaN and infinity among them).
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: cannot be written as JSON: {error}") from error
    write_atomically(path, text.encode())


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces the file at `path`, creating folders; on disk before it takes the name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file. Raises ValueError that names file, line and column of what is wrong."""
    content = Path(path).read_bytes()
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8: {error.reason}") from error


def _is_ours(name: str) -> bool:
    return name == ".lock" or (name.startswith(".") and name.endswith(".tmp"))


def _as_json(value: Any) -> Any:
    """The value as it comes back from a file: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat.update(_flat(item, f"{prefix}{name}."))
        else:
            flat[prefix + name] = item
    return flat


def _same(left: Any, right: Any) -> bool:
    # True == 1 in Python, but not in a config.
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
