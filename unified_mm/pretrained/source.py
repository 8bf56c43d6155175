"""A directory as Hugging Face's libraries write it: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by name from here on
import numpy as np
import safetensors
from jaxtyping import Float

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16", "F64")


class Section(Mapping[str, Any]):
    """One object of a JSON file: what it lacks is as its library's default says.

    Attributes:
      where: file and key, for messages.
    """

    def __init__(self, where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.where = where
        self._defaults = defaults
        self._values = {**defaults, **values}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise ValueError(f"{self.where} has no {key!r}")
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where neither the file nor its library has one."""
        return self._values.get(key, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def section(self, key: str, defaults: Mapping[str, Any]) -> Section:
        """The object at `key`; one that is not there has the defaults alone."""
        return Section(f"{self.where}: {key}", self._values.get(key) or {}, defaults)

    def refuse_unless(self, key: str, *allowed: Any, why: str) -> None:
        """Raises ValueError naming the key, where its value is none of `allowed` nor missing."""
        if key in self._values and self._values[key] not in allowed:
            value = self._values[key]
            raise ValueError(f"{self.where}: {key}={value!r} cannot be read here: {why}")


class Source:
    """An opened directory; a context manager.

    Attributes:
      path: of the directory.
      config: config.json, without any defaults.
      names: of the tensors.

    Raises:
      FileNotFoundError: no such directory, config.json, weights or shard.
      ValueError: a file that is damaged, naming it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory).expanduser()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no directory")
        config = self.json("config.json")
        if config is None:
            raise FileNotFoundError(
                f"{self.path} has no config.json: give a directory as save_pretrained writes it, "
                f"with config.json and {WEIGHTS}"
            )
        self.config = Section(str(self.path / "config.json"), config, {})
        self._open = ExitStack()
        try:
            self._files = self._open_all()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._files)

    def json(self, name: str, kind: type = dict) -> Any:
        """The object (or list) in a file; None where there is no such file."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # what is no JSON, and what is no UTF-8
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(found, kind):
            raise ValueError(f"{path}: holds no JSON {'object' if kind is dict else kind.__name__}")
        return found

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """As float32; 16-bit numbers become the same numbers."""
        path, file = self._files[name]
        kind = file.get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise ValueError(
                f"{path}: {name} is of type {kind}, and only {', '.join(FLOATS)} are read"
            )
        try:
            return np.asarray(file.get_tensor(name)).astype(np.float32)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from error

    def _open_all(self) -> dict[str, tuple[Path, Any]]:
        """By tensor, the file that holds it."""
        index = self.json(INDEX)
        if index is None:
            if not (self.path / WEIGHTS).is_file():
                raise FileNotFoundError(
                    f"{self.path} has neither {WEIGHTS} nor {INDEX}{self._other_weights()}"
                )
            path, file = self._open_file(WEIGHTS)
            return dict.fromkeys(file.keys(), (path, file))  # noqa: SIM118
        shards = index.get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{self.path / INDEX}: has no weight_map")
        opened = {shard: self._open_file(shard) for shard in sorted(set(shards.values()))}
        held = {shard: set(file.keys()) for shard, (_, file) in opened.items()}
        for name, shard in shards.items():
            if name not in held[shard]:
                raise ValueError(f"{self.path / shard}: has no {name}, which {INDEX} says it holds")
        return {name: opened[shard] for name, shard in shards.items()}

    def _open_file(self, name: str) -> tuple[Path, Any]:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no {name}, which {INDEX} names")
        try:
            return path, self._open.enter_context(safetensors.safe_open(path, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is no whole safetensors file ({error}): fetch it again"
            ) from error

    def _other_weights(self) -> str:
        others = sorted(path.name for path in self.path.glob("*.bin"))
        if not others:
            return ""
        return f"; {others[0]} is not read: save the model again with safe_serialization=True"
