"""Training that begins with weights of other runs: a modality's tower, a text model, or both.

Runs of imported weights (`python -m unified_mm.import_weights`) serve as well as trained ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unified_mm.config import Config, get_field, set_field
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import MAIN_ALONE, STACK_FIELDS, defaults
from unified_mm.inference.quantized_params import dequantized, saved_shapes
from unified_mm.nn.options import TransformerOptions
from unified_mm.parallel.sharding import path_of, without_names
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder, keeps_average
from unified_mm.task import build_task

# How a stack is computed and regularised is the new run's own affair.
STACK = tuple(name for name in STACK_FIELDS if name not in (*MAIN_ALONE, "attention"))
BLOCK = re.compile(r"(.*/layers)/block_(\d+)/(.*)")


def prefixes(part: str) -> tuple[str, str]:
    """Returns the path prefixes of a part's parameters: the text model, or a modality's tower."""
    return f"embedders_{part}/", "transformer/" if part == "text" else f"towers_{part}/"


def config_from_run(config: ConfigDict, asked: Collection[str]) -> ConfigDict:
    """Returns the config with every field that the weights it starts from decide.

    Args:
      config: `model.start_from` names runs by part, text or a modality with a tower; '' for none.
      asked: fields that the command line set; these must agree with the weights.

    Raises:
      FileNotFoundError: no run there.
      ValueError: weights that the fusion cannot use, or a field that contradicts them.
    """
    chosen = ConfigDict(config.to_dict())
    for part, run in config.model.start_from.items():
        if not run:
            continue
        saved = saved_config(run, part, config.model.fusion)
        taken = text_of(saved, run) if part == "text" else tower_of(saved, part)
        if part not in config.model.modalities or part in config.model.towers:
            raise ValueError(
                f"model.start_from.{part}: model.modalities must declare {part}, and model.towers "
                "must not, for the weights decide its tower"
            )
        for field, value in taken.items():
            if field in asked and get_field(config, field) != value:
                given = get_field(config, field)
                raise ValueError(
                    f"{field}={given!r}, but the weights of model.start_from.{part}={run!r} have "
                    f"{value!r}: leave the field"
                )
            set_field(chosen, field, value)
    return chosen


def saved_config(run: str, part: str, fusion: str) -> dict[str, Any]:
    """Returns the config of a run that has weights for a part.

    Raises:
      FileNotFoundError: no run there.
      ValueError: the run or the fusion does not have the part.
    """
    folder = RunFolder(run)
    if not folder.exists:
        raise FileNotFoundError(f"model.start_from.{part}={run!r} is no run: it has no config.json")
    saved = folder.read_config(defaults())
    if part != "text" and fusion == "early":
        raise ValueError(
            f"model.start_from.{part}: early fusion has no {part} tower; use fusion 'late' or "
            "'gated_cross_attention'"
        )
    if part != "text" and saved["model"]["fusion"] == "early":
        raise ValueError(f"model.start_from.{part}={run!r} is early fusion and has no {part} tower")
    if part not in saved["model"]["modalities"]:
        raise ValueError(f"model.start_from.{part}={run!r} reads no {part}")
    if saved.get("imported", {}).get("part", part) not in (part, "both"):
        raise ValueError(
            f"model.start_from.{part}={run!r} holds weights of {saved['imported']['part']} alone"
        )
    return saved


def text_of(saved: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Returns the fields that a text model's weights decide, by dotted name."""
    model = saved["model"]
    text = {k: v for k, v in model["modalities"]["text"].items() if k not in ("type", "length")}
    contrastive = saved["objectives"]["contrastive"]
    return {
        **{f"model.{name}": model[name] for name in STACK},
        **{f"model.modalities.text.{name}": value for name, value in text.items()},
        "model.modalities.text.max_positions": text["max_positions"]
        or model["modalities"]["text"]["length"],
        "data.tokenizer": str(RunFolder(run).tokenizer.absolute()),
        "data.special_tokens": saved["data"]["special_tokens"],
        "objectives.contrastive.text_pool": contrastive["text_pool"],
    }


def tower_of(saved: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns the fields that the weights of a modality's tower decide, by dotted name."""
    model, data = saved["model"], saved["data"]
    options = TransformerOptions.from_config(model).changed(model["tower"])
    options = options.changed(model["towers"].get(part, {}))
    tower = {name: getattr(options, name) for name in STACK}
    modality = {k: v for k, v in model["modalities"][part].items() if k != "type"}
    taken = {f"model.modalities.{part}.{name}": value for name, value in modality.items()}
    if part != "image":
        return {f"model.towers.{part}": tower, **taken}
    return {
        "model.tower": tower,
        **taken,
        **{f"data.{name}": data[name] for name in ("image_size", "resampling", "fit")},
        "objectives.contrastive.pool": saved["objectives"]["contrastive"]["pool"],
    }


def weights_to_start_from(config: Config) -> dict[str, Any]:
    """Reads the parameters of the runs in `model.start_from`, by path, each block by its layer."""
    found: dict[str, Any] = {}
    for part, run in config.model.start_from.items():
        if run:
            found |= part_of_run(run, part)
    return found


def load_params(params: Any, config: Config, found: Mapping[str, Any]) -> Any:
    """Replaces the parameters that `weights_to_start_from` found; shardings stay.

    Args:
      params: the new run's parameters.
      config: the new run's config.
      found: what `weights_to_start_from` returned.

    Raises:
      ValueError: a parameter of the part that the run does not have, or of another shape.
    """

    def one(key_path: Any, leaf: Any) -> Any:
        path = path_of(key_path)
        begun = (part for part, run in config.model.start_from.items() if run)
        part = next((each for each in begun if path.startswith(prefixes(each))), None)
        if part is None or "/cross/" in path:
            return leaf
        run = config.model.start_from[part]
        value = _restacked(found, path, leaf.shape)
        if value is None or value.shape != leaf.shape:
            has = "nothing" if value is None else f"{list(value.shape)}"
            raise ValueError(
                f"{path}: this model needs {list(leaf.shape)}, model.start_from.{part}={run!r} has "
                f"{has}"
            )
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, params)


def part_of_run(run: str, part: str) -> dict[str, Any]:
    """Reads one part of a run's newest checkpoint.

    Returns:
      NumPy arrays by path, each block by its layer.
    """
    folder = RunFolder(run)
    saved = folder.read_config(defaults())
    named = saved["data"]["special_tokens"]
    if folder.tokenizer.is_file():
        tokenizer = TextTokenizer.load(folder.tokenizer, **named)
    else:  # an image tower has none, and its shapes depend on none
        tokenizer = TextTokenizer.train([], 260)
    config = Config(saved)
    shapes = without_names(saved_shapes(build_task(config, tokenizer), config))
    wanted = {top: tree for top, tree in shapes.items() if f"{top}/" in prefixes(part)}
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        name = "average" if keeps_average(saved["train"]) else "params"
        restored = checkpoints.restore({name: wanted}, partial=True)
    leaves = jax.tree_util.tree_leaves_with_path(dequantized(restored.state[name]))
    return _by_layer({path_of(path): np.asarray(leaf) for path, leaf in leaves})


def _by_layer(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Splits stacked blocks: `.../layers/block_1/x` [periods, ...] to `.../layers/<layer>/x`."""
    blocks = {int(m[2]) for m in map(BLOCK.fullmatch, leaves) if m}
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        match = BLOCK.fullmatch(path)
        if match is None:
            found[path] = leaf
            continue
        before, block, after = match[1], int(match[2]), match[3]
        for period in range(leaf.shape[0]):
            found[f"{before}/{period * len(blocks) + block}/{after}"] = leaf[period]
    return found


def _restacked(found: Mapping[str, Any], path: str, shape: tuple[int, ...]) -> Any:
    """Returns the leaf that belongs at `path`, its layers stacked again, or None."""
    match = BLOCK.fullmatch(path)
    if match is None:
        return found.get(path)
    before, block, after = match[1], int(match[2]), match[3]
    layers = sorted(
        int(name.removeprefix(f"{before}/").split("/")[0])
        for name in found
        if name.startswith(f"{before}/") and name.endswith(f"/{after}")
    )
    blocks = max(1, len(layers) // shape[0])
    names = [f"{before}/{period * blocks + block}/{after}" for period in range(shape[0])]
    if len(layers) != shape[0] * blocks or any(name not in found for name in names):
        return None
    return np.stack([found[name] for name in names])
