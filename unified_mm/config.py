"""The config of a run: read-only, and it records which of its fields were read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
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
