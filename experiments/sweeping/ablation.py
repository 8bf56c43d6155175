"""Ablations: one question each, asked as variants of a recipe over several seeds.

A file of `experiments/ablations/` states question and expected answer in its docstring and defines
`get_ablation(size)`, as a recipe defines `get_config(size)`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_mm.cli.recipes import load_recipe
from unified_mm.evaluation.directions import higher_is_better

Overrides = Mapping[str, Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")
# What a sweep sets itself.
OWN = ("seed", "workdir")


@dataclass(frozen=True)
class Span:
    """A range that a search draws from.

    Attributes:
      low: the lowest value.
      high: the highest value.
      log: whether values are drawn evenly in their logarithm.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"{self}: low must be below high, and above 0 for a logarithm")


@dataclass(frozen=True)
class Search:
    """A search of hyper-parameters: its space and its objective.

    Attributes:
      space: config field -> a `Span`, or a sequence of values to choose from.
      score: the score in `result.json` to optimise.
      higher: whether a higher score is better; None where the score's name says so.
      prune_by: the metric in `metrics.jsonl` by which hopeless trials are stopped, lower being
        better; '' runs all trials to their end.
    """

    space: Mapping[str, Span | Sequence[Any]]
    score: str
    higher: bool | None = None
    prune_by: str = "loss"

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("a search needs something in its space")
        if self.higher is None:
            object.__setattr__(self, "higher", higher_is_better(self.score))


@dataclass(frozen=True)
class Ablation:
    """Variants of one recipe that differ only in what the question is about.

    Attributes:
      config: the recipe with its size, such as configs/coco.py:tiny; the field `config` of a
        variant names another one.
      scores: the scores in `result.json` that answer the question, the most important one first.
      seeds: the seeds, the same for all variants, so that differences are paired.
      variants: fields by name of the variant; the first is the base that the others are compared
        with.
      grid: in place of `variants`: field -> values; each combination is a variant.
      common: config fields, by dotted name, that all variants set.
      power_law: which of `scores` (lower being better) a power law of FLOPs is fitted to; '' for
        none.
      search: hyper-parameters to search with `--trials`, None for none.

    Raises:
      ValueError: if a seed comes twice, there are none or no scores, `power_law` is none of them,
        or as `all_variants` does.
    """

    config: str
    scores: Sequence[str]
    seeds: Sequence[int]
    variants: Mapping[str, Overrides] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    common: Overrides = field(default_factory=dict)
    power_law: str = ""
    search: Search | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={tuple(self.seeds)}: at least one, each once")
        if not self.scores or isinstance(self.scores, str):
            raise ValueError(f"scores={self.scores!r}: a tuple of those that it is read from")
        if not isinstance(self.search, Search | None):
            raise ValueError("search must be a Search")
        if self.power_law and self.power_law not in self.scores:
            raise ValueError(f"power_law: {self.power_law} is none of the scores: add it there")
        self.all_variants()

    def all_variants(self) -> dict[str, dict[str, Any]]:
        """Returns every variant's fields, with the common ones.

        Raises:
          ValueError: if there are no variants, a name is invalid, a variant sets a field that the
            sweep sets, or two variants are equal.
        """
        if bool(self.variants) == bool(self.grid):
            raise ValueError("an ablation has variants or a grid, one of the two")
        named = self.variants or _combinations(self.grid)
        found: dict[str, dict[str, Any]] = {}
        known: dict[str, str] = {}
        for name, changes in named.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"variant {name!r}: letters, digits and . _ = - make its name")
            fields = {**self.common, **changes}
            for own in OWN:
                if own in fields:
                    raise ValueError(f"variant {name!r} sets {own}, which the sweep does")
            text = json.dumps(fields, sort_keys=True)
            if text in known:
                raise ValueError(f"variants {known[text]!r} and {name!r} are the same")
            known[text] = name
            found[name] = fields
        return found

    @property
    def base(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.all_variants()))


def _combinations(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        parts = (f"{name.rsplit('.', 1)[-1]}={value}" for name, value in chosen.items())
        found["_".join(parts)] = chosen
    return found


def load_ablation(given: str) -> tuple[str, Ablation]:
    """Returns the name and the ablation of FILE or FILE:SIZE.

    The default size is the smallest, 'tiny'. Any other size is part of the name, because its
    results differ.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if what the file defines is no ablation.
    """
    path, _, size = given.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no ablation {path!r}; give experiments/ablations/NAME.py"
        )
    if size and not NAME.fullmatch(size):
        raise ValueError(f"{given}: {size!r} is no size")
    with faults_named(path):
        module = load_recipe(path)
    if not (module.__doc__ or "").strip():
        raise ValueError(f"{path} has no docstring: it states the question and what is expected")
    if not hasattr(module, "get_ablation"):
        raise ValueError(f"{path} is no ablation, for it defines no get_ablation(size)")
    with faults_named(path):
        ablation = module.get_ablation(size or "tiny")
    if not isinstance(ablation, Ablation):
        raise ValueError(f"{path}: its get_ablation returns a {type(ablation).__name__}")
    name = Path(path).stem
    return (f"{name}_{size}" if size not in ("", "tiny") else name), ablation


@contextlib.contextmanager
def faults_named(path: str) -> Iterator[None]:
    """Turns an error of a user's file in the body into a ValueError that names file and line.

    Raises:
      ValueError: if the body raises an error.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [each.lineno for each in frames if each.filename == os.path.abspath(path)]
        place = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{path}, line {place}" if place else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
