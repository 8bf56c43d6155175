"""The definition of a family of pretrained weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.pretrained.fields import Fields
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table
from unified_mm.pretrained.vocabularies import TokenLayout

# A stem is the beginning of an image tower; a modality is its tower.
Part = Literal["both", "image", "stem", "text", "audio", "video"]


@dataclass(frozen=True)
class Export:
    """The functions that write a run in a family's format.

    Attributes:
      architecture: the class of transformers that reads it.
      config: returns what config.json says besides, for a run's config and tokenizer.
      compared: dotted prefixes of the run's fields that must be the same once this config.json is
        read back.
      files: returns the contents of further JSON files, by name, for a run's config.
      part: what of a run it is: all, or one of two towers.
    """

    architecture: str
    config: Callable[[Mapping[str, Any], Any], dict[str, Any]]
    compared: tuple[str, ...]
    files: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]] = lambda config: {}
    part: Literal["whole", "image", "text"] = "whole"


@dataclass(frozen=True)
class Family:
    """An architecture of pretrained weights, and how its models are read and written.

    Attributes:
      name: name of the family, for messages.
      types: values of `model_type` in config.json that belong to the family.
      part: the part of a model that the weights are.
      fields: returns the fields of a run's config that differ from the defaults. Only the
        modalities and objectives that are named in it are switched on.
      table: returns the table of the weights, for a run's config and the names of the tensors.
      tokens: layout of the special tokens; None for a family without text.
      export: how a run is written in this format; None where it cannot be.
    """

    name: str
    types: tuple[str, ...]
    part: Part
    fields: Callable[[Source], Fields]
    table: Callable[[Mapping[str, Any], frozenset[str]], Table]
    tokens: TokenLayout | None = None
    export: Export | None = None

    def files(self, config: Mapping[str, Any], tokenizer: TextTokenizer | None) -> dict[str, Any]:
        """Returns the contents of the JSON files of a run in this format, by name."""
        assert self.export is not None
        head = {"architectures": [self.export.architecture], "model_type": self.types[0]}
        said = {**head, **self.export.config(config, tokenizer), "dtype": "float32"}
        return {"config.json": said, **self.export.files(config)}


def prefix(names: frozenset[str], usual: str, *, probe: str) -> str:
    """Returns `usual`, or '' where the tensor `probe` has no prefix, as in older files."""
    return "" if probe in names else usual


def token_ids(tokenizer: TextTokenizer) -> dict[str, int | None]:
    """Returns the ids of the begin and end tokens, as config.json has them."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
