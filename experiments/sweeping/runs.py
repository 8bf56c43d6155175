"""The runs of an ablation: their commands, and whether they are finished."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.sweeping.ablation import OWN, Ablation
from unified_mm.cli.recipes import Recipe, check_seed, read_recipe, resolve
from unified_mm.default_config import defaults
from unified_mm.runs.folder import FREE_FIELDS, RunFolder, differences

ROOT = Path(__file__).parents[2]
# A run taken on to more steps is another one, for its schedule spans them; so is one on other data,
# which a finished run does not look at again.
OTHER = ("train.steps", "data.dir", "data.mixture.*.dir")
FREE = tuple(name for name in FREE_FIELDS if name not in OTHER)


@dataclass(frozen=True)
class Run:
    """One training of one variant with one seed.

    Attributes:
      variant: the variant of the ablation.
      seed: the seed.
      config: the path of the recipe, with its size.
      fields: `--config.FIELD=VALUE` for each field that is set, except the seed.
      folder: the folder of the run.
    """

    variant: str
    seed: int
    config: str
    fields: tuple[str, ...]
    folder: RunFolder

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    def config_arguments(self) -> list[str]:
        """Returns the arguments that set the run's config."""
        return [f"--config={self.config}", *self.fields, f"--config.seed={self.seed}"]

    def arguments(self) -> list[str]:
        """Returns the arguments of `python`."""
        workdir = f"--workdir={self.folder.path}"
        return ["-m", "unified_mm.main", *self.config_arguments(), workdir]

    def elsewhere(self, workdir: str) -> list[str]:
        """Returns the command to run inside any checkout, with the run in `workdir`."""
        config = [
            each.replace(f"--config={ROOT}/", "--config=") for each in self.config_arguments()
        ]
        return ["python", "-m", "unified_mm.main", *config, f"--workdir={workdir}"]

    def shell_line(self) -> str:
        """Returns the command as a line for a shell."""
        return shlex.join(self.elsewhere(str(self.folder.path)))


def runs_of(
    ablation: Ablation,
    folder: Path,
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    more: Sequence[str] = (),
) -> list[Run]:
    """Returns the runs, ordered by seed, so that each seed's comparison is complete early.

    Args:
      ablation: the ablation.
      folder: the folder of the sweep.
      seeds: seeds in place of the ablation's.
      only: the variants to take; () takes all.
      more: further `--config.FIELD=VALUE`, for all runs.

    Raises:
      ValueError: if a variant or a seed does not exist, or the recipe refuses fields or values.
    """
    check_seeds(seeds or ablation.seeds)
    for each in more:
        if each.removeprefix("--config.").partition("=")[0] in OWN:
            raise ValueError(f"{each}: the sweep sets that itself; see --seeds")
    variants = ablation.all_variants()
    for name in only:
        if name not in variants:
            raise ValueError(f"--only={name}: there are {', '.join(variants)}")
    chosen = {name: variants[name] for name in (only or variants)}
    runs = [
        make_run(f"{name}", seed, fields, ablation.config, folder, more)
        for seed in (seeds or ablation.seeds)
        for name, fields in chosen.items()
    ]
    for run in runs[: len(chosen)]:
        check_run(run)
    return runs


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError if a seed is invalid or comes twice."""
    for seed in seeds:
        check_seed(seed)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: each may come once")


def make_run(
    variant: str,
    seed: int,
    fields: Mapping[str, Any],
    config: str,
    folder: Path,
    more: Sequence[str] = (),
) -> Run:
    """Returns a run in its folder below that of the sweep; `more` is set after `fields`."""
    changes = dict(fields)
    recipe = changes.pop("config", config)
    given = tuple(f"--config.{name}={as_flag(value)}" for name, value in changes.items())
    path = RunFolder(folder / f"{variant}-{seed}")
    return Run(variant, seed, str(ROOT / recipe), (*given, *more), path)


def as_flag(value: Any) -> str:
    """Returns a value as the command line takes it."""
    return str(tuple(value)) if isinstance(value, list | tuple) else str(value)


def check_run(run: Run) -> None:
    """Raises ValueError, naming the variant, if its recipe refuses fields or values."""
    try:
        recipe_of(run)
    except (OSError, ValueError) as error:
        raise ValueError(f"variant {run.variant!r}: {' '.join(str(error).split())}") from error


def recipe_of(run: Run) -> Recipe:
    """Returns the recipe with the run's fields, as the main command reads it."""
    found = read_recipe(run.config, run.config_arguments()[1:])
    assert found is not None
    return found


@cache
def resolved(path: str, fields: tuple[str, ...]) -> str:
    """Returns, as JSON, the config that the main command makes of a recipe and fields."""
    recipe = read_recipe(path, fields)
    assert recipe is not None
    return json.dumps(resolve(recipe, lambda _: None).to_dict())


def asked_config(run: Run) -> dict[str, Any]:
    """Returns the config that the run would start with."""
    asked: dict[str, Any] = json.loads(resolved(run.config, run.fields))
    return {**asked, "seed": run.seed}


def finished(run: Run) -> bool:
    """Returns whether the run is finished, and checks that it has the config of the sweep.

    Raises:
      ValueError: if its folder holds a run with another config; the message names the fields.
      RunFolderError: if its config or its result is damaged.
    """
    if not run.folder.exists:
        return False
    found = differences(run.folder.read_config(defaults()), asked_config(run), FREE)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{run.folder.path} holds another run: {'; '.join(map(str, found[:3]))}{more}; give "
            "the --config.FIELD=VALUE that it was made with, or another --name"
        )
    if run.folder.finished:
        run.folder.read_result()
    return run.folder.finished


def environment() -> dict[str, str]:
    """Returns the environment of the runs: this process's, with this checkout on PYTHONPATH."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def python_command(run: Run) -> list[str]:
    """Returns the command of a run with this process's own interpreter."""
    return [sys.executable, *run.arguments()]
