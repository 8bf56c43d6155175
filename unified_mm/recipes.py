"""From the command line's config flags to one resolved config."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict, config_flags


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
    chosen = _load(path).get_config(size)
    for field in config_flags.get_override_values(flag):
        _set(chosen, field, _get(config, field))
    return chosen


def overridden(flag: Any) -> list[str]:
    """Dotted names of the fields that the command line set."""
    return sorted(config_flags.get_override_values(flag))


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for name in parents:
        config = config[name]
    config[last] = value
