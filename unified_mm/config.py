"""The config of a run: read-only, and it records which of its fields were read."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from unified_mm.registry import resolve


class MissingField(AttributeError, KeyError):
    """Error for a field that a config does not have; the message names it."""


class Config(Mapping[str, Any]):
    """Nested options, read by attribute or by key; every field that is read is recorded.

    A field that a user sets and nothing reads would be a silent mistake: `unread` finds it.
    """

    def __init__(
        self, fields: Mapping[str, Any], _path: str = "", _reads: set[str] | None = None
    ) -> None:
        reads: set[str] = set() if _reads is None else _reads
        self.__dict__["_reads"] = reads
        self.__dict__["_path"] = _path
        self.__dict__["_fields"] = {
            name: Config(value, f"{_path}{name}.", reads) if isinstance(value, Mapping) else value
            for name, value in fields.items()
        }

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            near = difflib.get_close_matches(name, self._fields, n=1)
            hint = f" Did you mean {self._path}{near[0]}?" if near else ""
            raise MissingField(
                f"config has no field {self._path}{name}.{hint} There are: "
                f"{', '.join(self._fields)}."
            )
        self._reads.add(self._path + name)
        return self._fields[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the config is read-only: {self._path}{name} cannot be set")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """Returns a copy with other values of some fields.

        Reads of either config count for both.

        Raises:
          MissingField: if the config has no such field.
        """
        for name in changes:
            self[name]  # an unknown one is an error
        return Config({**self.as_dict(), **changes}, self._path, self._reads)

    def unread(self, paths: Iterator[str] | list[str]) -> list[str]:
        """Returns those of the dotted `paths` that nothing has read yet."""
        return [path for path in paths if path not in self._reads]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain nested values, for JSON, without marking them as read."""
        return {
            name: value.as_dict() if isinstance(value, Config) else value
            for name, value in self._fields.items()
        }


def get_field(config: Mapping[str, Any] | ConfigDict, field: str) -> Any:
    """Returns the value of a field by its dotted name."""
    node: Any = config
    for name in field.split("."):
        node = node[name]
    return node


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    """Sets a field, by its dotted name, to a value of any type."""
    *parents, last = field.split(".")
    node = config
    for name in parents:
        node = node[name]
    with node.ignore_type():
        node[last] = ConfigDict(value) if isinstance(value, Mapping) else value


# What limits a number: the test that it passes, and what is said of it.
LIMITS = {
    "above": (operator.gt, "above {}"),
    "least": (operator.ge, "at least {}"),
    "most": (operator.le, "at most {}"),
    "below": (operator.lt, "below {}"),
}


def option(
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[Any] = (),
    registry: Mapping[str, Any] | None = None,
    **limits: float | int,
) -> Any:
    """Returns a dataclass field whose values `check_options` and `build_options` hold to a range.

    Args:
      default: of the field; without one it must be given.
      choices: all values that there are.
      registry: the built-in names that there are, beside `package.module:NAME` from outside.
      **limits: of `LIMITS`; `below` infinity is for what must be finite.
    """
    metadata = {"choices": tuple(choices), "registry": registry, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


def defaults_of(kind: Any) -> dict[str, Any]:
    """Returns the defaults of a dataclass's fields by name, of those that have one."""
    fields = dataclasses.fields(kind)
    return {each.name: each.default for each in fields if each.default is not dataclasses.MISSING}


def check_options(options: Any, where: str) -> None:
    """Raises ValueError, naming the field, for a value outside its field's range or choices.

    Args:
      options: an instance of a dataclass.
      where: the group of the config that its fields stand in, for messages.
    """
    for each in dataclasses.fields(options):
        value, said = getattr(options, each.name), each.metadata
        name = _dotted(where, each.name)
        if said.get("choices") and value not in said["choices"]:
            allowed = ", ".join(map(str, said["choices"]))
            raise ValueError(f"{name}={value!r}: must be one of {allowed}")
        if said.get("registry") and value not in said["registry"]:
            resolve(name, value, said["registry"])
        limits = said.get("limits", {})
        if not all(LIMITS[kind][0](value, limit) for kind, limit in limits.items()):
            words = [
                "finite" if limit == math.inf else LIMITS[kind][1].format(limit)
                for kind, limit in limits.items()
            ]
            raise ValueError(f"{name}={value}: must be {' and '.join(words)}")


def build_options(kind: Any, group: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Returns an instance of a dataclass of options: read from a group, cast, filled and checked.

    A field whose type is such a dataclass is read from the group of its name. What the group holds
    beside the fields is not read, and a field that it lacks has its default.

    Args:
      kind: the dataclass.
      group: of a config.
      where: the group's dotted name, for messages.
      **given: fields that are not the group's.

    Raises:
      MissingField: the config lacks a field without a default.
      ValueError: a value of another type, or outside its field's range or choices.
    """
    asked = {each.name: each.default for each in dataclasses.fields(kind)}
    own = {
        name: group[name]  # without a default, an error that names it
        for name, default in asked.items()
        if name not in given and (name in group or default is dataclasses.MISSING)
    }
    built = kind(**given, **read_options(kind, own, where))
    check_options(built, where)
    return built


def read_options(kind: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns what a mapping says of the fields of a dataclass, each as its field's type.

    Args:
      kind: a dataclass, or a Flax module, whose fields are its options.
      given: a group of a config.
      where: the group's dotted name, for messages.

    Raises:
      ValueError: a field that there is not, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    names = [each.name for each in dataclasses.fields(kind) if each.init]
    found = {}
    for name, value in given.items():
        path = _dotted(where, name)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}: {kind.__name__} has no such option{hint}")
        found[name] = _cast(hints.get(name), value, path)
    return found


# Types that a value is held to, and the types of what is taken for one; `bool` is no number.
TAKEN: dict[Any, Any] = {int: int, float: (int, float), bool: bool, str: str, tuple: (list, tuple)}


def _cast(kind: Any, value: Any, where: str) -> Any:
    """Returns a value as a field's type; of a type that is not in `TAKEN` as it is."""
    if dataclasses.is_dataclass(kind):
        return build_options(kind, value, where)
    plain = typing.get_origin(kind) or kind
    if plain not in TAKEN:
        return value
    if not isinstance(value, TAKEN[plain]) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"{where}={value!r}: must be a {plain.__name__}")
    parts = typing.get_args(kind)
    if not parts:
        return plain(value)
    if parts[-1] is Ellipsis:
        parts = parts[:1] * len(value)
    if len(parts) != len(value):
        raise ValueError(f"{where}={tuple(value)}: must be {len(parts)} values")
    return tuple(_cast(part, each, where) for part, each in zip(parts, value, strict=True))


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
