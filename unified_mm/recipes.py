"""From the command line's config flags to one resolved config."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from unified_mm.data.images import resolve_backend
from unified_mm.models.unified import fusion
from unified_mm.objectives.objective import objective_kind
from unified_mm.training.sizes import fit_to_budget


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but a wrong recipe, size or field is one line and no traceback.

    Raises:
      SystemExit: with that line.
    """
    try:
        check_recipe(argv)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    return app.parse_flags_with_usage(argv)


def check_recipe(argv: list[str]) -> None:
    """Refuses a recipe that is not there, a size that it has not, and fields that no config has."""
    given = [value.split("=", 1)[1] for value in argv if value.startswith("--config=")]
    if not given:
        return
    path, _, size = given[-1].partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config={given[-1]}: there is no file {path!r}")
    recipe = load_recipe(path)
    config = recipe.get_config(size) if size else recipe.get_config()
    fields = list(_fields(config))
    for flag in argv:
        name = flag.split("=", 1)[0]
        if not name.startswith("--config."):
            continue
        field = name.removeprefix("--config.")
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name}: the config has no field {field!r}{hint}")


def resolve(
    config: ConfigDict, flag: flags.Flag, tell: Callable[[str], None]
) -> ConfigDict:
    """The config with everything decided that the recipe leaves open.

    Args:
      config: as parsed.
      flag: the absl flag it came from, which knows the recipe's file and the overrides.
      tell: takes a line about what was decided.
    """
    chosen = resolve_auto(config, flag)
    chosen.data.decoder = resolve_backend(chosen.data.decoder)
    chosen = serve_what_can_be(chosen, overridden(flag), tell)
    return fit_to_budget(chosen)


def serve_what_can_be(
    config: ConfigDict, asked: Collection[str], tell: Callable[[str], None]
) -> ConfigDict:
    """Without the recipe's objectives that its fusion cannot serve.

    Those that the command line asks for stay, and are refused when the model is built.

    Args:
      config: with a fusion that may not be the one its objectives were chosen for.
      asked: fields that the command line set.
      tell: takes a line for each objective that is switched off.
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


def resolve_auto(config: ConfigDict, flag: Any) -> ConfigDict:
    """The recipe's preset for the devices at hand, where the command asked for none.

    Fields that the command line set keep what it said.

    Args:
      config: as parsed; its `size` is 'auto' where the preset is still open.
      flag: the absl flag it came from, which knows the recipe's file and the overrides.
    """
    if config.get("size") != "auto":
        return config
    size = "tiny" if jax.default_backend() == "cpu" else "base"
    path = config_flags.get_config_filename(flag).split(":")[0]
    chosen = load_recipe(path).get_config(size)
    for field in config_flags.get_override_values(flag):
        _set(chosen, field, _get(config, field))
    return chosen


def overridden(flag: Any) -> list[str]:
    """Dotted names of the fields that the command line set."""
    return sorted(config_flags.get_override_values(flag))


def load_recipe(path: str | Path) -> Any:
    """The module of a recipe's file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields and groups."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for name in parents:
        config = config[name]
    config[last] = value
