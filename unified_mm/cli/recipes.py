"""Turns the command line's config flags into one resolved config."""

from __future__ import annotations

import ast
import difflib
import glob
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from unified_mm.config import get_field, set_field
from unified_mm.data.images import resolve_backend
from unified_mm.data.mirror import is_remote
from unified_mm.default_config import defaults
from unified_mm.files import naming, user_path
from unified_mm.models.unified import fusion
from unified_mm.nn.options import dtype_on
from unified_mm.objectives.objective import objective_kind
from unified_mm.pretrained.hub import not_installed, where_installed
from unified_mm.runs.saved import (
    UnknownField,
    field_paths,
    new_field,
    refuse_unknown,
    todays_config,
)
from unified_mm.training.sizes import fit_to_budget
from unified_mm.training.start_from import READER, config_from_run

# Where data lies and how it is checked; groups with all that they hold.
DATA_FIELDS = (
    "data.source",
    "data.dir",
    "data.tfds",
    "data.fields",
    "data.val_rows",
    "data.cache_dir",
    "data.manifest",
    "data.max_bad_share",
    "data.world",
)


@dataclass(frozen=True)
class Recipe:
    """A recipe as a command line names it.

    Attributes:
      path: the path of its file, with the size where one was given: configs/coco.py:base.
      config: the config, with the fields that the command line set.
      overrides: the dotted names of these fields.
    """

    path: str
    config: ConfigDict
    overrides: tuple[str, ...]


def read_recipe(path: str | None, fields: Sequence[str]) -> Recipe | None:
    """Returns the recipe of a command line, None if there is none.

    Args:
      path: the path of its file, or the name of a recipe of this package.
      fields: --config.FIELD=VALUE, or --config.FIELD VALUE, each.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the recipe, its size, a field or a value is wrong.
    """
    names = [each.partition("=")[0] for each in fields if each.startswith("--config.")]
    if path is None:
        if names:
            raise ValueError(f"{names[0]} changes a recipe: --config=FILE is needed beside it")
        return None
    path = recipe_file(path)
    known = list(field_paths(recipe_config(path).to_dict()))
    for name in names:
        field = name.removeprefix("--config.")
        if (new := new_field(field)) != field:
            raise ValueError(f"{name} is called --config.{new} now")
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name}: the config has no field {field!r}{hint}")
    argv = ["", f"--config={path}", *fields]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except (OSError, TypeError, flags.Error) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if rest:
        raise ValueError(
            f"{rest[0]!r} is no flag; is it the value of a field that is true or false? Those take "
            "it as --config.FIELD=VALUE alone"
        )
    overrides = config_flags.get_override_values(values["config"])
    return Recipe(path, holder.value, tuple(sorted(overrides)))


def recipe_file(given: str) -> str:
    """Returns the file of a recipe, with the size where one was given.

    Args:
      given: the path of the file, or for a recipe of this package its name alone, such as
        coco:tiny; a file of that name comes first.
    """
    name, colon, size = given.partition(":")
    found = own_recipes().get(name)
    if found is None or os.path.lexists(name):
        return given
    return f"{found}{colon}{size}"


def own_recipes() -> dict[str, Path]:
    """Returns the recipes of this package by name: in it where it is installed, else beside it."""
    package = Path(__file__).parents[1]
    inside, beside = package / "configs", package.parent / "configs"
    return {
        each.stem: each for each in sorted((inside if inside.is_dir() else beside).glob("*.py"))
    }


def recipe_config(given: str) -> ConfigDict:
    """Returns the config of a recipe, such as configs/coco.py:tiny.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is no recipe, or the recipe has no such size.
    """
    path, _, size = given.partition(":")
    check_is_recipe(path, f"--config={given}")
    get_config = load_recipe(path).get_config
    sizes = [size] if size else []
    try:
        inspect.signature(get_config).bind(*sizes)
    except TypeError as error:
        fault = f"the recipe has no sizes ({size!r})" if size else "the recipe needs a size"
        raise ValueError(f"--config={given}: {fault}") from error
    config = get_config(*sizes)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config={given}: its get_config returns a {type(config).__name__}, not a "
            "ml_collections.ConfigDict"
        )
    return config


def check_is_recipe(path: str, flag: str) -> None:
    """Checks, without running it, that a file is Python and defines get_config.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is no recipe.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist: there is no such file"
        names = ", ".join(own_recipes())
        raise FileNotFoundError(f"{flag}: {path!r} {what}; this package has {names}, by name alone")
    with naming(flag):
        source = Path(path).read_bytes()
    try:
        members = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(f"{flag}: not a Python file{line}: a recipe is one") from error
    if not any(isinstance(m, ast.FunctionDef) and m.name == "get_config" for m in members):
        raise ValueError(f"{flag}: no recipe, for it defines no get_config")
    if not path.endswith(".py"):
        raise ValueError(f"{flag}: the name of a recipe ends in .py")


def resolve(
    recipe: Recipe,
    tell: Callable[[str], None],
    *,
    platform: str = "",
    saved: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Returns the config with everything decided that the recipe leaves open.

    Args:
      recipe: the recipe as the command line names it.
      tell: a function that takes a line about each decision.
      platform: that is computed on; '' is this process's.
      saved: the config of a run that goes on: it computes in the type of numbers, and has the
        weights, that it began with where the recipe leaves that open.

    Raises:
      ValueError: if a field is unknown, or a value cannot be used.
    """
    platform = platform or jax.default_backend()
    chosen = resolve_auto(recipe, platform)
    try:
        refuse_unknown(chosen.to_dict(), defaults())
    except UnknownField as error:
        raise ValueError(f"the recipe has what nothing reads: {error}") from error
    # A second contrast, say, names what it has other than the defaults of its type.
    chosen = ConfigDict(todays_config(chosen.to_dict(), defaults()))
    began = (
        saved["model"]["dtype"] if saved and chosen.model.dtype == "auto" else chosen.model.dtype
    )
    chosen.model.dtype = dtype_on(platform, began)
    check_seed(chosen.seed)
    settle_installed(chosen, saved, tell)
    settle_folders(chosen)
    try:
        chosen.data.decoder = resolve_backend(chosen.data.decoder)
    except ImportError as error:
        raise ValueError(f"data.decoder={chosen.data.decoder!r}: {error}") from error
    chosen = config_from_run(chosen, recipe.overrides)  # with its fusion
    return fit_to_budget(serve_what_can_be(chosen, recipe.overrides, tell))


def settle_installed(
    config: ConfigDict, saved: Mapping[str, Any] | None, tell: Callable[[str], None]
) -> None:
    """Sets the weights that are taken where they are installed; a run keeps those it began with."""
    start = config.model.start_from
    for part, run in start.items():
        if not run.endswith("?"):
            continue
        if saved:
            start[part] = saved["model"]["start_from"].get(part, "")
        elif part == READER and config.objectives.contrastive.weight <= 0:
            start[part] = ""  # nothing would read by it
        else:
            start[part] = where_installed(run)
            if not start[part]:
                tell(f"model.start_from.{part}='': {not_installed(run.removesuffix('?'))}")


def settle_folders(config: ConfigDict) -> None:
    """Makes the places of the data absolute: a run goes on, or is scored, from any directory."""
    sources = {f"data.mixture.{name}": source for name, source in config.data.mixture.items()}
    for field, group in ({"data": config.data} | sources).items():
        if group.get("dir") and not is_remote(group["dir"]):
            group["dir"] = str(user_path(group["dir"], f"{field}.dir").absolute())
    if config.data.manifest:
        config.data.manifest = str(user_path(config.data.manifest, "data.manifest").absolute())
    for field, group in {"data": config.data, "evaluation": config.evaluation}.items():
        if group.negatives_of:
            given = str(user_path(group.negatives_of, f"{field}.negatives_of"))
            group.negatives_of = os.path.join(glob.escape(os.getcwd()), given)


def settled_fields(config: ConfigDict) -> list[str]:
    """Returns the fields that only `resolve` reads, and nothing later in a run."""
    return ["model.budget", "model.budget_by"] if config.model.budget else []


def check_seed(seed: int) -> None:
    """Raises ValueError if the seed does not fit into the 32 bits that jax makes keys of."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be a whole number from 0 to {2**32 - 1}")


def serve_what_can_be(
    config: ConfigDict, asked: Collection[str], tell: Callable[[str], None]
) -> ConfigDict:
    """Returns the config without the recipe's objectives that its fusion does not support.

    Objectives that the command line asks for stay, and are refused when the model is built.

    Args:
      config: a config whose fusion may not support all its objectives.
      asked: the fields that the command line set.
      tell: a function that takes a line for each objective that is switched off.
    """
    chosen = ConfigDict(config.to_dict())
    able = fusion(chosen.model.fusion).abilities
    for name, options in chosen.objectives.items():
        field = f"objectives.{name}.weight"
        if options.weight <= 0 or field in asked:
            continue
        kind = objective_kind(options.type)
        if kind and kind not in able:
            tell(f"{field}=0: {chosen.model.fusion!r} fusion cannot serve it")
            options.weight = 0.0
    return chosen


def resolve_auto(recipe: Recipe, platform: str) -> ConfigDict:
    """Returns the recipe's config, with its preset chosen by the platform if `size` is 'auto'.

    The preset is 'tiny' on a CPU and 'base' otherwise. Fields that the command line set keep their
    values.
    """
    if recipe.config.get("size") != "auto":
        return recipe.config
    size = "tiny" if platform == "cpu" else "base"
    chosen: ConfigDict = load_recipe(recipe.path.split(":")[0]).get_config(size)
    for field in recipe.overrides:
        set_field(chosen, field, get_field(recipe.config, field))
    return chosen


def outside(fields: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Returns those of the dotted `fields` that are neither in `groups` nor below one of them."""
    return [
        field
        for field in fields
        if not any(field == group or field.startswith(f"{group}.") for group in groups)
    ]


def load_recipe(path: str | Path) -> Any:
    """Returns the module of a recipe's file."""
    # No name that can be imported: a recipe `numpy.py` must not stand for another module.
    spec = importlib.util.spec_from_file_location(f"recipe {Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up what is named in annotations
    spec.loader.exec_module(module)
    return module
