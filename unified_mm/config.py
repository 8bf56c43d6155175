"""The config of a run: read-only, and it records which of its fields were read."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


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


def get_field(config: ConfigDict, field: str) -> Any:
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


def option(
    default: Any = dataclasses.MISSING,
    *,
    least: float | int | None = None,
    below: float | int | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Returns a dataclass field whose values `check_options` and `read_options` hold to a range.

    Args:
      default: of the field; without one it must be given.
      least: the smallest value that is allowed.
      below: what the value must be smaller than.
      choices: all values that there are.
    """
    metadata = {"least": least, "below": below, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any, where: str) -> None:
    """Raises ValueError, naming the field, for a value outside its field's range or choices.

    Args:
      options: an instance of a dataclass.
      where: the group of the config that its fields stand in, for messages.
    """
    for each in dataclasses.fields(options):
        value, said = getattr(options, each.name), each.metadata
        name = f"{where}.{each.name}" if where else each.name
        if said.get("choices") and value not in said["choices"]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(said['choices'])}")
        least, below = said.get("least"), said.get("below")
        if (least is not None and not value >= least) or (below is not None and not value < below):
            words = f"at least {least}" if below is None else f"in [{least}, {below})"
            raise ValueError(f"{name}={value}: must be {words}")


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
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}.{name}: {kind.__name__} has no such option{hint}")
        found[name] = _cast(hints.get(name), value, f"{where}.{name}")
    return found


def _cast(kind: Any, value: Any, where: str) -> Any:
    """Returns a value as a field's type; other types than numbers, texts and tuples as it is."""
    if kind not in (int, float, bool, str, tuple):
        return value
    fits = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
        tuple: isinstance(value, list | tuple),
    }
    if not fits[kind]:
        raise ValueError(f"{where}={value!r}: must be a {kind.__name__}")
    return kind(value)
