"""Writes a run's weights in the format of the Hugging Face libraries.

    python -m unified_mm.export_weights --run runs/clip --out DIR
    python -m unified_mm.export_weights --run runs/clip --out DIR --part image

DIR gets config.json, model.safetensors, tokenizer.json and, for images, preprocessor_config.json.
The run's model has to be one of the families that can be written: CLIP, SigLIP, GPT-2, Llama,
Mistral, Qwen 2, Qwen 3. Mistral that was trained on is written as the Llama that it is. --part
writes one of CLIP's towers alone: the image's without its projection, the text's with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import defaults
from unified_mm.files import new_folder, refuse_existing, user_path, write_json
from unified_mm.inference.imported import ALONE, PARTS, run_config
from unified_mm.nn.options import TransformerOptions
from unified_mm.objectives.contrastive import MAX_LOG_SCALE
from unified_mm.pretrained.families import FAMILIES
from unified_mm.pretrained.family import Family
from unified_mm.pretrained.source import WEIGHTS, Source
from unified_mm.pretrained.tables import to_theirs
from unified_mm.runs.folder import RunFolder

# What a run may have otherwise than its family: none of it is part of the weights.
FREE = ("dropout", "remat", "attention", "unroll", "dtype", "exits")
# And of its contrast: none of these changes an embedding, and the scale is written as it is used.
FREE_OF_CONTRAST = ("weight", "weight_schedule", "chunk", "bound_scale")
LOG_SCALE = "heads_contrastive/log_scale"
TOWER_PARTS = {
    "image": PARTS["image"],
    "text": ("embedders_text/", "transformer/", "heads_contrastive/project_text"),
}


def export(
    config: Mapping[str, Any],
    params: Any,
    tokenizer: TextTokenizer | None,
    out: str | os.PathLike[str],
    part: str = "",
) -> Family:
    """Writes the weights of a run as those of one of the families, and returns the family.

    Args:
      config: the whole config of the run.
      params: the parameters of the run.
      tokenizer: the tokenizer of the run; None for an image tower.
      out: a new directory.
      part: 'image' or 'text' for one tower alone; '' for all that the run has.

    Raises:
      ValueError: if `out` exists, or the model fits none of the families that can be written; the
        message names the fields that differ.
    """
    path = user_path(out, "--out").absolute()
    with new_folder(path) as half:
        return _write(config, params, tokenizer, half, part or part_of(config))


def part_of(config: Mapping[str, Any]) -> str:
    """Returns the tower that a run is, 'image' or 'text'; 'whole' if it is more than one.

    Raises:
      ValueError: it is a tower that none of the families is written with.
    """
    imported = config.get("imported", {})
    if imported.get("part") in ALONE:
        raise ValueError(
            f"a tower of {imported['part']} ({imported['family']}) cannot be written again: what "
            f"it was read from is {imported['from']}"
        )
    if imported.get("part") == "image":
        return "image"
    alone = config["model"]["fusion"] == "late" and "image" not in config["model"]["modalities"]
    return "text" if alone else "whole"


def text_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a run without its image tower, if it has one."""
    found = deepcopy(dict(config))
    model, contrastive = found["model"], found["objectives"]["contrastive"]
    modalities = {"text": model["modalities"]["text"]}
    model |= {"modalities": modalities, "tower": defaults()["model"]["tower"], "towers": {}}
    contrastive |= {"between": "text", "projection": "none"}
    return found


def _write(
    config: Mapping[str, Any],
    params: Any,
    tokenizer: TextTokenizer | None,
    folder: Path,
    part: str,
) -> Family:
    kept = TOWER_PARTS.get(part, ("",))
    ours = {
        path: np.asarray(leaf)
        for path, leaf in flatten_dict(params, sep="/").items()
        if path.startswith(kept)
    }
    config = text_alone(config) if part == "text" else config
    family = family_that_fits(config, tokenizer, folder, part)
    if LOG_SCALE in ours and config["objectives"]["contrastive"]["bound_scale"]:
        # Others know no bound: they get the scale that the run has computed with.
        ours[LOG_SCALE] = np.minimum(ours[LOG_SCALE], np.float32(MAX_LOG_SCALE))
    tensors = to_theirs(family.table(config, frozenset()), ours)
    if tokenizer is not None and part != "image":
        _write_tokenizer(config, tokenizer, folder)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return family


def _write_tokenizer(config: Mapping[str, Any], tokenizer: TextTokenizer, folder: Path) -> None:
    tokenizer.save(folder / "tokenizer.json")
    named = tokenizer.special_tokens
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": named["bos"] or None,
            "eos_token": named["eos"],
            "pad_token": named["pad"],
            "model_max_length": config["model"]["modalities"]["text"]["max_positions"],
        },
    )


def family_that_fits(
    config: Mapping[str, Any], tokenizer: TextTokenizer | None, folder: Path, part: str = "whole"
) -> Family:
    """Returns the family whose config.json can express all that the run's config says of a part.

    Writes that config.json into `folder`, reads it back and compares the result with the run.

    Raises:
      ValueError: if there is no such family; the message names the fields that differ.
    """
    why = []
    began = config.get("imported", {}).get("family")
    # Of two that are alike, such as Llama and Mistral, the one that the weights came from.
    for family in sorted(FAMILIES, key=lambda each: each.name != began):
        if family.export is None or family.export.part != part:
            continue
        try:
            for name, content in family.files(config, tokenizer).items():
                write_json(folder / name, content)
            again = run_config(family, _ConfigOnly(folder), tokenizer)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            why.append(f"{family.name}: {error or type(error).__name__}")
            continue
        other = differing(config, again, family.export.compared)
        if not other:
            return family
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        why.append(f"{family.name}: {', '.join(other[:3])}{more}")
    raise ValueError(
        "the run's model is none that can be written. What is other than in each family:\n  "
        + "\n  ".join(why)
    )


class _ConfigOnly(Source):
    """A directory without weights, which are still to be written."""

    def _open_all(self) -> dict[str, Any]:
        return {}


def differing(
    one: Mapping[str, Any], other: Mapping[str, Any], prefixes: Sequence[str]
) -> list[str]:
    """Returns the dotted fields under the prefixes in which two configs' models differ."""
    left, right = (flatten_dict(said_of_model(each), sep=".") for each in (one, other))
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
        and left.get(name) != right.get(name)
    ]


def said_of_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config says of a model without gated layers, in one normal form."""
    m = config["model"]
    options = TransformerOptions.from_config(m)
    modalities = {name: dict(each) for name, each in m["modalities"].items()}
    if not modalities["text"]["attend_padding"]:  # else it is a part of what is computed
        modalities["text"].pop("length")
    model: dict[str, Any] = {"fusion": m["fusion"], **_kind(options), "modalities": modalities}
    if m["fusion"] != "early":
        model["tower"] = _kind(options.changed(m["tower"]))
    contrastive = dict(config["objectives"]["contrastive"])
    for name in FREE_OF_CONTRAST:
        del contrastive[name]
    said = {"model": model, "objectives": {"contrastive": contrastive}, "data": config["data"]}
    plain: dict[str, Any] = json.loads(json.dumps(said))
    return plain


def _kind(options: TransformerOptions) -> dict[str, Any]:
    """Returns the options that define a transformer, with KV heads and head width resolved."""
    given = [each.name for each in fields(options) if each.init]
    names = [name for name in given if name not in (*FREE, "cross")]
    said = {name: getattr(options, name) for name in names}
    said["dropping"] = asdict(options.dropping)
    return said | {"key_value_heads": options.num_kv_heads, "head_width": options.head_dim}


@command("export_weights", __doc__, needs=("run", "out"), takes=("part",))
def main(options: argparse.Namespace) -> int:
    """Loads the run and writes its weights."""
    from unified_mm.inference.loaded import load
    from unified_mm.inference.quantized_params import dequantized
    from unified_mm.training.start_from import leaves_of_run

    refuse_existing(Path(options.out))
    folder = RunFolder(options.run)
    saved = folder.read_config(defaults()) if folder.exists else {}
    if saved and "image" in (options.part, part_of(saved)):  # there may be no text model
        leaves = leaves_of_run(options.run, "image")
        family = export(saved, unflatten_dict(leaves, sep="/"), None, options.out, "image")
    else:
        model = load(options.run)
        config, params = model.config.as_dict(), dequantized(model.params)
        family = export(config, params, model.task.tokenizer, options.out, options.part or "")
    say(f"family: {family.name}")
    say(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
