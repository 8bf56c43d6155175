"""What a family of weights is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table
from unified_mm.pretrained.vocabularies import TokenLayout

Part = Literal["both", "image", "text"]
Fields = dict[str, Any]  # of a run's config, nested


@dataclass(frozen=True)
class Export:
    """How a family is written back.

    Attributes:
      config: a run's config and tokenizer -> their config.json.
      compared: the fields of a run that their config.json must give again; dotted prefixes.
      files: further files by name, from the run's config.
    """

    config: Callable[[Mapping[str, Any], TextTokenizer], dict[str, Any]]
    compared: tuple[str, ...]
    files: Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]] = lambda config: {}


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
      name: of the family; as `model_type` in config.json has it, in `types`.
      part: of a model that the weights are.
      fields: what a run's config has other than the defaults. Only the modalities and the
        objectives that are named in it are switched on.
      table: where the tensors go, for a run's config and the names that there are.
      tokens: what stands around a text; None without text.
      export: the way back, where there is one.
    """

    name: str
    types: tuple[str, ...]
    part: Part
    fields: Callable[[Source], Fields]
    table: Callable[[Mapping[str, Any], frozenset[str]], Table]
    tokens: TokenLayout | None
    export: Export | None = None


def prefix(names: frozenset[str], usual: str, *, probe: str) -> str:
    """`usual`, or '' where the tensor `probe` is there without it, as older files have it."""
    return "" if probe in names else usual


def text_fields(**more: Any) -> Fields:
    """Text as most models embed it: neither scaled nor with an embedding of its modality."""
    return {"modality_embedding": False, "scaled": False, **more}
