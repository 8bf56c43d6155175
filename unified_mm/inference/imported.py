"""Weights of other projects as the parameters of a run, in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from unified_mm.config import Config, set_field
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import default_config, defaults
from unified_mm.files import new_folder, write_json
from unified_mm.parallel.processes import first_before_others
from unified_mm.parallel.sharding import without_names
from unified_mm.pretrained.families import family_of
from unified_mm.pretrained.family import Family, Part
from unified_mm.pretrained.hub import PACKAGE, directory_of, pinned
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import to_ours
from unified_mm.pretrained.vocabularies import read_tokenizer
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.task import build_task

FORMAT = 1  # raise it when imported runs change: those of installed packages are made anew then
# Part of a model -> what the paths of its parameters begin with.
PARTS: dict[Part, tuple[str, ...]] = {
    "image": ("embedders_image/", "towers_image/"),
    "stem": ("embedders_image/stem/",),
    "audio": ("embedders_audio/", "towers_audio/", "heads_contrastive/"),
    "video": ("embedders_video/", "towers_video/", "heads_contrastive/"),
}
# Towers that embed by themselves, without a text model beside them.
ALONE: tuple[Part, ...] = ("audio", "video")


@dataclass(frozen=True)
class Imported:
    """Weights converted to the parameters of a run.

    Attributes:
      config: the whole config of the run.
      params: float32, a tree as `build_task(config, tokenizer).init` returns it, or a part of it.
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


def write_run(imported: Imported, out: str | os.PathLike[str]) -> RunFolder:
    """Writes the imported weights as a run at step 0, and leaves nothing if that fails.

    Raises:
      ValueError: if `out` exists.
    """
    folder = RunFolder(out)
    with new_folder(folder.path) as half:
        run = RunFolder(half)
        write_json(run.config, imported.config)
        if imported.tokenizer is not None:
            imported.tokenizer.save(run.tokenizer)
        state = {"params": jax.tree.map(jax.numpy.asarray, imported.params)}
        with Checkpoints(run.checkpoints, asynchronous=False) as checkpoints:
            checkpoints.save(0, state, {"step": 0, "imported": imported.config["imported"]})
    return folder


def run_of(given: str, cache: Path) -> str:
    """Returns the run that is given, or for `package:NAME/FOLDER` one of the weights in it.

    It is kept in `cache/imported/` until the package has other files.

    Raises:
      FileNotFoundError: if the package is not installed.
      ValueError: as `import_directory` does.
    """
    if not given.startswith(PACKAGE):
        return given
    directory = directory_of(given)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    known = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps([FORMAT, known]).encode()).hexdigest()
    folder = RunFolder(cache / "imported" / digest[:16])
    with first_before_others("the weights of a package"):
        try:
            if not folder.exists:
                write_run(import_directory(directory), folder.path)
        except (OSError, ValueError):
            if not folder.exists:  # else another command was faster
                raise
    return str(folder.path)


def run_config(family: Family, source: Source, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Returns the default config with the family's fields set, in plain values as JSON has them.

    Raises:
      ValueError: if the tokenizer has more tokens than there are embeddings.
    """
    fields = family.fields(source)
    chosen = default_config()
    usual = defaults()["model"]["modalities"]
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
    """Returns the shape of each parameter of a run by path, or of a part of `PARTS` alone.

    Args:
      config: the whole config of the run.
      tokenizer: the tokenizer; None if there is no text.
      part: the part of a model that is imported.

    Raises:
      ValueError: if no model can be built from the config.
    """
    # An image tower stands beside a text model that is yet to be chosen: any will do here.
    task = build_task(Config(config), tokenizer or TextTokenizer.train([], 260))
    shapes = without_names(jax.eval_shape(task.init, jax.random.key(0)))
    found = {path: tuple(leaf.shape) for path, leaf in flatten_dict(shapes, sep="/").items()}
    beginnings = PARTS.get(part, ("",))
    return {path: shape for path, shape in found.items() if path.startswith(beginnings)}
