"""JSON from users' files, with errors that give the file and the place in it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from unified_mm.files import read_json

_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


class Node(NamedTuple):
    """A value in a JSON file, with methods whose ValueErrors give the file and the JSON path."""

    file: Path
    where: str  # '' for the whole file, else such as annotations[17]
    value: Any

    @property
    def place(self) -> str:
        """The short name of this value for a list of problems."""
        return f"{self.file.name}: {self.where}"

    def error(self, message: str, key: str = "") -> ValueError:
        where = f"{self.where}.{key}".strip(".") or "the file"
        return ValueError(f"{self.file}: {where} {message}")

    def has(self, key: str) -> bool:
        """Returns whether this object has the key, with a value other than null and ''."""
        return self._object().get(key) not in (None, "")

    def get(self, key: str) -> Any:
        members = self._object()
        if key not in members:
            raise self.error("is missing", key)
        return members[key]

    def string(self, key: str) -> str:
        return self._text(self._checked(self.get(key), str, key), key)

    def id(self, key: str) -> int | str:
        value = self.get(key)
        if type(value) is int:
            return value
        if not isinstance(value, str):
            raise self.error(f"must be a whole number or a string, is {_shown(value)}", key)
        return self._text(value, key)

    def items(self, key: str = "") -> list["Node"]:
        """Returns the members of the list under `key`, or of this list itself."""
        values = self._checked(self.get(key) if key else self.value, list, key)
        where = f"{self.where}.{key}".strip(".")
        return [Node(self.file, f"{where}[{i}]", value) for i, value in enumerate(values)]

    def _text(self, value: str, key: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error("holds half of a surrogate pair, which is no text", key) from error
        return value

    def _object(self) -> dict:
        return self.value if isinstance(self.value, dict) else self._checked(self.value, dict)

    def _checked(self, value: Any, kind: type, key: str = "") -> Any:
        if not isinstance(value, kind):
            raise self.error(f"must be {_NAMES[kind]}, is {_shown(value)}", key)
        return value


def read(path: Path) -> Node:
    """Reads a whole JSON file, as `files.read_json` does."""
    return Node(path, "", read_json(path))


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."
