"""Directories that Hugging Face's libraries or open_clip write: config, weights, tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by name from here on
import numpy as np
import safetensors
from jaxtyping import Float

from unified_mm.files import read_json, sha256
from unified_mm.pretrained.torch_file import TorchFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What open_clip writes, safetensors or what torch.save makes of the same.
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What hubs of torch call a file of weights: the architecture, and how its SHA-256 begins.
NAMED_WEIGHTS = re.compile(r"(?P<architecture>.+)-(?P<sha256>[0-9a-f]{8})\.pth")
WEIGHTS_OF_ANY_FORM = (WEIGHTS, INDEX, *OPEN_CLIP_WEIGHTS)
FLOATS = ("F32", "F16", "BF16", "F64")


class Section(dict[str, Any]):
    """One object of a JSON file.

    Attributes:
      where: file and key, for error messages.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.where = where

    def section(self, key: str) -> Section:
        """Returns the object at `key`, an empty one where it is not there."""
        return Section(f"{self.where}: {key}", self.get(key) or {})

    def refuse_unless(self, key: str, *allowed: Any, why: str) -> None:
        """Raises ValueError, naming the key, where it has a value that is none of `allowed`."""
        if key in self and self[key] not in allowed:
            raise ValueError(f"{self.where}: {key}={self[key]!r} cannot be read here: {why}")


class Source:
    """An opened directory of weights; a context manager.

    Attributes:
      path: path of the directory.
      config: contents of config.json.
      names: names of the tensors.

    Raises:
      FileNotFoundError: if the directory, config.json, the weights or a shard is missing.
      ValueError: if a file is damaged; the message names it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory).expanduser()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no directory")
        name, config = "config.json", self.json("config.json")
        others = [each for each in OPEN_CLIP_WEIGHTS if (self.path / each).is_file()]
        theirs = any((self.path / each).is_file() for each in (WEIGHTS, INDEX))
        self._alone = ""  # the one file of weights, where its name is not the usual one
        if others and (config is None or not theirs) and (said := self.json(OPEN_CLIP)):
            name, config, self._alone = (
                OPEN_CLIP,
                {"model_type": "open_clip", **said},
                others[0],
            )
        elif config is None and (named := self._named_weights()) is not None:
            name = self._alone = named.string
            config = {"model_type": named["architecture"]}
        if config is None:
            raise FileNotFoundError(
                f"{self.path} has no config.json: give a directory as save_pretrained writes it, "
                f"with config.json and {WEIGHTS}, or as open_clip does, or with one file "
                "ARCHITECTURE-SHA256.pth"
            )
        self.config = Section(str(self.path / name), config)
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
        """The names of all tensors."""
        return frozenset(self._files)

    def json(self, name: str, kind: type = dict) -> Any:
        """Returns the object (or list) in a JSON file, or None where there is no such file.

        Raises:
          ValueError: if the file is not JSON, or holds something else than a `kind`.
        """
        path = self.path / name
        if not path.is_file():
            return None
        found = read_json(path)
        if not isinstance(found, kind):
            raise ValueError(f"{path}: holds no JSON {'object' if kind is dict else kind.__name__}")
        return found

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """Returns a tensor in float32, which holds 16-bit numbers exactly.

        Raises:
          ValueError: if the tensor is of a type not in `FLOATS`, or cannot be read.
        """
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
        """Returns for each tensor the path of the file that holds it, and the opened file."""
        if self._alone:
            path, file = self._open_file(self._alone)
            return dict.fromkeys(file.keys(), (path, file))  # noqa: SIM118
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
        if path.suffix in (".bin", ".pth"):
            return path, self._open.enter_context(TorchFile(path))
        try:
            return path, self._open.enter_context(safetensors.safe_open(path, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is no whole safetensors file ({error}): fetch it again"
            ) from error

    def _named_weights(self) -> re.Match[str] | None:
        """Returns the only file that names its architecture, None if there is none, or several.

        Raises:
          ValueError: if it is not what its name says.
        """
        files = [NAMED_WEIGHTS.fullmatch(path.name) for path in self.path.glob("*.pth")]
        match = files[0] if len(files) == 1 else None
        if match is not None and not sha256(self.path / match.string).startswith(match["sha256"]):
            raise ValueError(
                f"{self.path / match.string}: its SHA-256 does not begin with {match['sha256']}, "
                "as its name says: it is damaged, fetch it again"
            )
        return match

    def _other_weights(self) -> str:
        others = sorted(path.name for path in self.path.glob("*.bin"))
        if not others:
            return ""
        return f"; {others[0]} is not read: save the model again with safe_serialization=True"
