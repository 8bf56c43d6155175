"""Weights of other projects as the parameters of a run, in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from unified_mm.config import Config, set_field
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import default_config
from unified_mm.parallel.sharding import without_names
from unified_mm.pretrained.families import family_of
from unified_mm.pretrained.family import Family, Part
from unified_mm.pretrained.hub import pinned
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import to_ours
from unified_mm.pretrained.vocabularies import read_tokenizer
from unified_mm.task import build_task

IMAGE_PARTS = ("embedders_image/", "towers_image/")


@dataclass(frozen=True)
class Imported:
    """Weights converted to the parameters of a run.

    Attributes:
      config: the whole config of the run.
      params: float32, a tree as `build_task(config, tokenizer).init` returns it, or its image part.
      tokenizer: the tokenizer; None if there is no text.
      part: which part of a model the weights are.
      family: the family of the weights.
      ignored: the names of tensors that are not used, by reason.
    """

    config: dict[str, Any]
    params: Any
    tokenizer: TextTokenizer | None
    part: Part
    family: str
    ignored: Mapping[str, tuple[str, ...]]


def import_directory(directory: str | os.PathLike[str]) -> Imported:
    """Reads and converts weights of a known family.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if an architecture, an option or a tensor is not known, or a file is damaged; the
        message names it.
    """
    with Source(directory) as source:
        family = family_of(source)
        tokenizer = read_tokenizer(source, family.tokens) if family.tokens else None
        config = run_config(family, source, tokenizer)
        places = parameter_shapes(config, tokenizer, family.part)
        table = family.table(config, source.names)
        where = str(source.path)
        found, ignored = to_ours(table, source.names, source.tensor, places, where)
    params = unflatten_dict(found, sep="/")
    return Imported(config, params, tokenizer, family.part, family.name, ignored)


def run_config(family: Family, source: Source, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Returns the default config with the family's fields set, in plain values as JSON has them.

    Raises:
      ValueError: if the tokenizer has more tokens than there are embeddings.
    """
    fields = family.fields(source)
    chosen = default_config()
    usual = chosen.model.modalities.to_dict()
    asked = fields["model"].pop("modalities")
    chosen.model.modalities = {name: usual[name] | more for name, more in asked.items()}
    for objective in chosen.objectives.values():
        objective.weight = 0.0
    for field, value in flatten_dict(fields, sep=".").items():
        set_field(chosen, field, value)
    config = chosen.to_dict()
    if tokenizer is not None:
        named = {**tokenizer.special_tokens, "space_before_target": tokenizer.words_need_spaces}
        config["data"]["special_tokens"] = named
        known, rows = tokenizer.vocabulary_size, asked["text"]["vocabulary"]
        if known > rows:
            raise ValueError(
                f"{source.path}: its tokenizer has {known} tokens, but config.json has embeddings "
                f"for {rows}"
            )
    config["imported"] = {
        "family": family.name,
        "part": family.part,
        "from": str(source.path.absolute()),
        **pinned(source.path),
    }
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def parameter_shapes(
    config: Mapping[str, Any], tokenizer: TextTokenizer | None, part: Part
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter of a run by path, or of its image part only.

    Args:
      config: the whole config of the run.
      tokenizer: the tokenizer; None if there is no text.
      part: 'image' for the image part only.

    Raises:
      ValueError: if no model can be built from the config.
    """
    # An image tower stands beside a text model that is yet to be chosen: any will do here.
    task = build_task(Config(config), tokenizer or TextTokenizer.train([], 260))
    shapes = without_names(jax.eval_shape(task.init, jax.random.key(0)))
    found = {path: tuple(leaf.shape) for path, leaf in flatten_dict(shapes, sep="/").items()}
    if part == "image":
        return {path: shape for path, shape in found.items() if path.startswith(IMAGE_PARTS)}
    return found
