"""Conversion of what earlier versions saved: the fields of configs and the names in checkpoints.

The default of a field means what the code did before there was the field, so a config that lacks it
is completed with the default. What was renamed has a line in one of the tables below.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from unified_mm.registry import moved

# Fields: a pattern of the dotted name that was saved, and the last part of today's name.
RENAMED_FIELDS = {
    "model.modalities.*.deviation": "std",
    "model.modalities.*.places": "max_positions",
    "train.average_decay": "ema_decay",
    "train.phases.*.train.average_decay": "ema_decay",
}
# Leaves of a state: a pattern of the path that it has now (a regular expression of the whole path),
# and what it is called in older checkpoints.
RENAMED_LEAVES: tuple[tuple[str, str], ...] = ()

# Groups that a run's config may hold beside those of the defaults: where its weights come from.
ORIGINS = ("imported", "quantized")
# The groups that every version has written; a config without one is damaged, not old.
GROUPS = ("data", "model", "objectives", "train", "evaluation")
# Groups whose members users name; a member that has a `type` takes that type's defaults.
NAMED_GROUPS = ("model.modalities", "objectives", "train.phases")
# Groups whose fields are those of a kind, by the field beside them that names it: none is added.
KIND_GROUPS = {"model.feed_forward_options": "feed_forward_type"}
# Groups that a recipe may give fields of its own: of each modality, where its weights come from.
FREE_GROUPS = ("model.start_from",)
# Groups that code from outside the package may read fields of its own from, and the fields that
# name the code.
OPEN_GROUPS = {
    "data": ("source",),
    "model": ("fusion", "block"),
    "train": ("optimizer", "schedule", "treatment"),
}


class UnknownField(ValueError):
    """The error that a config holds a field this version does not know; the message names it."""


def todays_config(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config with today's names, completed with the defaults.

    Args:
      saved: as a version before this one wrote it, or this one.
      defaults: of all fields; `*` stands for the members of a group that users name.

    Raises:
      UnknownField: a later version wrote the config.
      ValueError: it is damaged.
    """
    for group in GROUPS:
        if not isinstance(saved.get(group), Mapping):
            raise ValueError(f"it has no group {group!r}")
    fields = {name: value for name, value in saved.items() if name not in ORIGINS}
    origins = {name: value for name, value in saved.items() if name in ORIGINS}
    return _completed(_todays_names(fields), defaults) | origins


def with_kinds_completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config in which the options of kinds that it lacks have their defaults.

    So that one that came later is no difference between a run and what a recipe asks for.
    """
    found = json.loads(json.dumps(config))
    for path, field in KIND_GROUPS.items():
        group, _, name = path.rpartition(".")
        own = defaults[group].get(name, {}).get(found[group].get(field), {})
        found[group][name] = json.loads(json.dumps(own)) | found[group].get(name, {})
    return found


def refuse_unknown(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks that a new run's config has no field that nothing reads or that has another name now.

    Raises:
      UnknownField: it has one, which the message names.
      ValueError: it has none of a group that every config has.
    """
    for path in field_paths(config):
        if (new := new_field(path)) != path:
            raise UnknownField(f"the field {path} is called {new} now")
    todays_config(config, defaults)


def saved_name(path: str, saved: Collection[str]) -> str | None:
    """Returns the name of a state's leaf in a checkpoint, None where it has no such leaf."""
    if path in saved:
        return path
    for pattern, before in RENAMED_LEAVES:
        if re.fullmatch(pattern, path) and (name := re.sub(pattern, before, path)) in saved:
            return name
    return None


def new_field(path: str) -> str:
    """Returns the dotted name that a field has now, which is mostly the one it had."""
    *group, name = path.split(".")
    for pattern, new in RENAMED_FIELDS.items():
        wanted = pattern.split(".")
        if len(wanted) == len(group) + 1 and all(map(fnmatch.fnmatchcase, (*group, name), wanted)):
            return ".".join((*group, new))
    return path


def field_paths(fields: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields and groups."""
    for name, value in fields.items():
        yield f"{group}{name}"
        if isinstance(value, Mapping):
            yield from field_paths(value, f"{group}{name}.")


def _todays_names(fields: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{group}{name}"
        new = new_field(path).rpartition(".")[2]
        if new != name and new in fields:
            raise ValueError(f"it has both {path} and {group}{new}, which is its new name")
        if isinstance(value, Mapping):
            found[new] = _todays_names(value, f"{path}.")
        else:
            found[new] = moved(value) if isinstance(value, str) else value
    return found


def _completed(
    fields: Mapping[str, Any], defaults: Mapping[str, Any], group: str = ""
) -> dict[str, Any]:
    """Returns a group's fields, those that it lacks by their defaults."""
    if group in NAMED_GROUPS:
        return _completed_members(fields, defaults, group)
    open_to_others = group in FREE_GROUPS or any(
        ":" in str(fields.get(each, "")) for each in OPEN_GROUPS.get(group, ())
    )
    absent: dict[str, Any] = {
        name: _completed_members({}, value, path)
        for name, value in defaults.items()
        if (path := f"{group}.{name}".lstrip(".")) in NAMED_GROUPS
    }
    kinds = {path.rpartition(".")[2] for path in KIND_GROUPS if path.rpartition(".")[0] == group}
    found = {**defaults, **absent, **{name: {} for name in kinds}}
    for name, value in fields.items():
        path, default = f"{group}.{name}".lstrip("."), defaults.get(name)
        if name not in defaults and not open_to_others:
            raise UnknownField(f"the field {path}")
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            whole = path in KIND_GROUPS or not default
            found[name] = value if whole else _completed(value, default, path)
        elif isinstance(default, Mapping) or (default is not None and isinstance(value, Mapping)):
            raise UnknownField(f"the field {path}={value!r}, which is a group in but one of them")
        else:
            found[name] = value
    return found


def _completed_members(
    members: Mapping[str, Any], defaults: Mapping[str, Any], group: str
) -> dict[str, Any]:
    """Returns the members of a group that users name, each completed by its type's defaults."""
    found = {}
    for name, options in members.items():
        kind = options.get("type")
        if ":" in str(kind):  # code from outside the package knows its own defaults
            found[name] = dict(options)
            continue
        known = [defaults.get(name, {}), defaults.get("*", {}), *defaults.values()]
        alike = [default for default in known if default and default.get("type") == kind]
        if not alike:
            raise UnknownField(f"the field {group}.{name}.type is {kind!r}")
        found[name] = _completed(options, alike[0], f"{group}.{name}")
    if group == "objectives":  # an objective that came later is switched off
        absent = {name: {**each, "weight": 0.0} for name, each in defaults.items()}
        found = absent | found
    return found
