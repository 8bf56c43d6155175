"""The run folder: its files, its config, and the lock that keeps a run to one process.

Its files: config.json, tokenizer.json (and reader_tokenizer.json), checkpoints/, best/,
metrics.jsonl, tensorboard/, captions.json and answers.json (what the model wrote), report.html and
result.json (written last: the run is finished). A run that is taken on to more steps keeps its old
result as result_STEPS.json, and what it wrote likewise.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_mm.files import (
    LOCK,
    FolderHeld,
    hold,
    is_text,
    read_json,
    sha256,
    system_says,
    user_path,
    write_json,
)
from unified_mm.runs.saved import UnknownField, todays_config, with_kinds_completed

# What may change between two commands on one run: none of it changes what the run computes at a
# step. The data behind another `data.dir`, `data.manifest` or `data.negatives_of` is compared by
# its fingerprint, not by its place; what sounds are scored, by nothing.
FREE_FIELDS = (
    "train.steps",
    "train.epochs",
    "mesh.*",
    "logging.*",
    "checkpoint.*",
    "data.dir",
    "data.mixture.*.dir",
    "data.manifest",
    "data.negatives_of",
    "evaluation.negatives_of",
    "data.cache_dir",
    "data.workers",
    "data.threads",
    "model.attention",
    "model.tower.attention",
    "model.remat",
    "workdir",
)

_ABSENT = object()
_SHOWN = 30  # differences that are listed

OWN_CONFIG = "put the run's own config back, or choose another --workdir"
RESCORE = "delete it, and the same command scores the run again"


class RunFolderError(RuntimeError):
    """The error that a folder cannot be used as a run."""


class RunLocked(RunFolderError):
    """The error that another process holds the run."""


class ConfigDifference(ValueError):
    """The error that the folder's run was started with another config than the one asked for."""


@dataclass(frozen=True)
class Difference:
    """A config field that differs.

    Attributes:
      field: its dotted name.
      run: the run's value, as text.
      asked: the value asked for, as text.
    """

    field: str
    run: str
    asked: str

    def __str__(self) -> str:
        return f"{self.field}: run has {self.run}, command asks {self.asked}"


class RunFolder:
    """The paths of a run, and operations on its folder as a whole; making one creates no files.

    Raises:
      ValueError: the path names the home of a user that there is not.
      RunFolderError: the path is no UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = user_path(path, "the run folder").absolute()
        if not is_text(str(self.path)):
            raise RunFolderError(
                f"{os.fsencode(self.path)!r} is no UTF-8: choose another folder as --workdir"
            )
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.reader_tokenizer = self.path / "reader_tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.result = self.path / "result.json"
        self.exits = self.path / "exits.json"  # `calibrate` wrote it
        self.report = self.path / "report.html"
        self.profile = self.path / "profile"
        self.operations = self.profile / "operations.json"  # where steps spent their time

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def exists(self) -> bool:
        """Returns whether a run was started here.

        Raises:
          RunFolderError: the folder cannot be read.
        """
        with _refusing(self.path):
            return self.config.is_file()

    @property
    def finished(self) -> bool:
        """Returns whether the run is finished: `result.json` is written last."""
        return self.result.is_file()

    def saved_config(self) -> dict[str, Any]:
        """Returns the run's config as it was saved.

        Raises:
          RunFolderError: the file holds none.
        """
        return _object(self.config, OWN_CONFIG)

    def read_config(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the run's config with today's fields, those that it lacks by their defaults.

        Args:
          defaults: of all fields (`default_config.defaults`).

        Raises:
          RunFolderError: the file is damaged, or a later version wrote it.
        """
        try:
            return todays_config(self.saved_config(), defaults)
        except UnknownField as unknown:
            raise RunFolderError(
                f"{self.config} was written by a later version: this one does not know {unknown}. "
                "Use that version"
            ) from unknown
        except ValueError as error:
            raise RunFolderError(f"{self.config} is damaged: {error}; {OWN_CONFIG}") from error

    def read_result(self) -> dict[str, Any]:
        """Returns a finished run's result.

        Raises:
          RunFolderError: the file holds none; the message names what is wrong.
        """
        found = _object(self.result, RESCORE)
        scores = found.get("scores")
        if not isinstance(scores, dict) or not all(
            isinstance(value, int | float) for value in scores.values()
        ):
            raise RunFolderError(
                f"{self.result} is damaged: `scores` are no numbers by name; {RESCORE}"
            )
        for name in ("steps", "seconds", "flops", "parameters"):
            if not isinstance(found.get(name), int | float | None):
                raise RunFolderError(f"{self.result} is damaged: {name} is no number; {RESCORE}")
        return found

    def finished_steps(self) -> int:
        """Returns the number of steps after which the result was taken.

        Raises:
          RunFolderError: the result has no such number.
        """
        steps = _object(self.result, RESCORE).get("steps")
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise RunFolderError(f"{self.result} is damaged: it says no number of steps; {RESCORE}")
        return steps

    def set_result_aside(self) -> None:
        """Renames the result of a run that is continued to `result_<steps>.json`.

        So it does with what the model wrote. The run then counts as not finished.
        """
        if not self.finished:
            return
        steps = self.finished_steps()
        for name in ("captions", "answers", "result"):
            if (file := self.path / f"{name}.json").is_file():
                os.replace(file, self.path / f"{name}_{steps}.json")

    def tokenizer_digest(self) -> str | None:
        """Returns the SHA-256 of the tokenizer's file, None where there is none.

        With a reader's beside it, it is that of both.
        """
        if not self.tokenizer.is_file():
            return None
        own = sha256(self.tokenizer)
        if not self.reader_tokenizer.is_file():
            return own
        return hashlib.sha256(f"{own} {sha256(self.reader_tokenizer)}".encode()).hexdigest()

    def check_tokenizer(self, metadata: Mapping[str, Any]) -> None:
        """Checks that the tokenizer is the one that a checkpoint's metadata names.

        Checkpoints that name none (imported weights) are taken as they are.

        Raises:
          RunFolderError: it is another one, or missing.
        """
        known = metadata.get("tokenizer")
        if known is not None and known != self.tokenizer_digest():
            fault = "is not" if self.tokenizer.exists() else "is missing:"
            if self.reader_tokenizer.exists():
                fault = f"with {self.reader_tokenizer.name} {fault}"
            raise RunFolderError(
                f"{self.tokenizer} {fault} the tokenizer that this run was trained with (SHA-256 "
                f"{known[:12]}...): put that one back, for token ids mean nothing without it"
            )

    def create_or_check(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
        """Starts the run with `config`, or checks that the run here may go on with it.

        Fields that are free to change (`FREE_FIELDS`) are taken over into `config.json`. An
        error leaves the folder as it was.

        Args:
          defaults: of all fields (`default_config.defaults`).

        Returns:
          Whether the run is new.

        Raises:
          ConfigDifference: other fields differ; the message lists them (of very many, the first).
          RunFolderError: the folder holds something else.
        """
        new = self.check(config, defaults)
        if new or read_json(self.config) != _as_json(config):
            with _refusing(self.path):
                write_json(self.config, config)
        return new

    def check(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
        """Checks as `create_or_check` does, and writes nothing."""
        self._refuse_foreign_folder()
        if not self.exists:
            return True
        asked = todays_config(_as_json(config), defaults)
        saved = self.read_config(defaults)
        saved, asked = (with_kinds_completed(each, defaults) for each in (saved, asked))
        found = differences(saved, asked)
        if found:
            raise ConfigDifference(self._explain(found))
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process (see `files.hold`).

        Raises:
          RunLocked: another process has it; the message names the process.
        """
        self._refuse_foreign_folder()
        with contextlib.ExitStack() as stack:
            try:
                with _refusing(self.path):
                    stack.enter_context(hold(self.path))
            except FolderHeld as held:
                raise RunLocked(f"{held}, or choose another --workdir") from held
            yield

    def _refuse_foreign_folder(self) -> None:
        with _refusing(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise RunFolderError(
                    f"{self.path} is a file, not a folder; choose another --workdir"
                )
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
        lines = "\n".join(f"  {difference}" for difference in found[:_SHOWN])
        if len(found) > _SHOWN:
            lines += f"\n  and {len(found) - _SHOWN} more"
        return (
            f"the run in {self.path} has another config than this command asks for:\n{lines}\n"
            "Choose another --workdir for a new run, or give the run's own values to go on with "
            f"it. Only these may change within a run: {', '.join(FREE_FIELDS)}."
        )


def keeps_average(train: Mapping[str, Any]) -> bool:
    """Returns whether checkpoints of a run with this `config.train` hold averaged parameters.

    The averages are then what is scored and used.
    """
    return train["ema_decay"] > 0 or train["optimizer"] == "schedule_free"


@contextlib.contextmanager
def _refusing(run: Path) -> Iterator[None]:
    """Raises an OSError within the context as a RunFolderError that names the run's folder."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{run} cannot be used as a run: {system_says(error)}; choose another --workdir"
        ) from error


def _object(path: Path, advice: str) -> dict[str, Any]:
    """Reads the JSON object in one of a run's own files.

    Args:
      advice: ends the message of the error.

    Raises:
      RunFolderError: the file holds none.
    """
    try:
        value = read_json(path)
    except ValueError as error:
        raise RunFolderError(f"{error}; {advice}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} is damaged: it holds no JSON object; {advice}")
    return value


def differences(
    run: Mapping[str, Any], asked: Mapping[str, Any], free: tuple[str, ...] = FREE_FIELDS
) -> tuple[Difference, ...]:
    """Returns the fields in which two nested configs differ, sorted by dotted name.

    Args:
      free: patterns of names that are passed over, as `fnmatch` reads them ('mesh.*').
    """
    left, right = _flat(_as_json(run)), _flat(_as_json(asked))
    return tuple(
        Difference(field, _show(left.get(field, _ABSENT)), _show(right.get(field, _ABSENT)))
        for field in sorted(left.keys() | right.keys())
        if not _same(left.get(field, _ABSENT), right.get(field, _ABSENT))
        and not any(fnmatch.fnmatchcase(field, pattern) for pattern in free)
    )


def _is_ours(name: str) -> bool:
    return name == LOCK or (name.startswith(".") and name.endswith(".tmp"))


def _as_json(value: Any) -> Any:
    """Returns the value as it comes back from a file: tuples are lists, keys are text."""
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
