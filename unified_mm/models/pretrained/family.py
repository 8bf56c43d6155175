"""What a family of weights is, and which there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.models.pretrained.source import Source
from unified_mm.models.pretrained.tables import Table
from unified_mm.models.pretrained.vocabularies import TokenLayout

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


# Near relatives that are something else, and why.
OTHERS = {"siglip2": "it takes pictures of any shape (naflex); other SigLIP 2 weights say 'siglip'"}


def families() -> tuple[Family, ...]:
    """All of them."""
    from unified_mm.models.pretrained.bert import BERT
    from unified_mm.models.pretrained.clip import CLIP, SIGLIP
    from unified_mm.models.pretrained.gpt2 import GPT2
    from unified_mm.models.pretrained.idefics import IDEFICS
    from unified_mm.models.pretrained.llama import LLAMA, QWEN2
    from unified_mm.models.pretrained.vit import VIT

    return (CLIP, SIGLIP, VIT, GPT2, LLAMA, QWEN2, BERT, IDEFICS)


def family_of(source: Source) -> Family:
    """The one that a directory's config.json names.

    Raises:
      ValueError: an architecture that is not known, with a list of what is.
    """
    found = source.config.get("model_type")
    for family in families():
        if found in family.types:
            return family
    why = f" ({OTHERS[found]})" if found in OTHERS else ""
    known = ", ".join(sorted(name for family in families() for name in family.types))
    raise ValueError(
        f"{source.config.where}: model_type={found!r} is no architecture that is known here{why}: "
        f"{known}"
    )


def prefix(names: frozenset[str], usual: str, *, probe: str) -> str:
    """`usual`, or '' where the tensor `probe` is there without it, as older files have it."""
    return "" if probe in names else usual


def text_fields(**more: Any) -> Fields:
    """Text as most models embed it: neither scaled nor with an embedding of its modality."""
    return {"modality_embedding": False, "scaled": False, **more}
