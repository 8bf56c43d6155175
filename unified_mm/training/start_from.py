"""Training that begins with weights of other runs: a whole model, or its text or a tower.

A whole model goes on as it is, as CLIP is fine-tuned: with its heads, rules, temperature and
preprocessing. What is a part stands in a model of another make, and the rest of it starts afresh.
Runs of imported weights (`python -m unified_mm.import_weights`) serve as well as trained ones.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from unified_mm.config import Config, get_field, set_field
from unified_mm.data.sources import cache_folder
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import MAIN_ALONE, STACK_FIELDS, defaults
from unified_mm.inference.imported import run_of
from unified_mm.inference.quantized_params import dequantized, saved_shapes
from unified_mm.modalities.audio import AudioModality
from unified_mm.modalities.image import PATCHES, resize_positions
from unified_mm.modalities.video import VideoModality, inflated
from unified_mm.nn.options import TransformerOptions
from unified_mm.objectives.contrastive import named_modalities
from unified_mm.parallel.sharding import path_of, without_names
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder, keeps_average
from unified_mm.task import build_task, load_tokenizer

# How a stack is computed and regularised is the new run's own affair.
STACK = tuple(name for name in STACK_FIELDS if name not in (*MAIN_ALONE, "attention"))
WHOLE = "whole"
STEM = "stem"  # of images: it stands in any fusion
READER = "reader"  # a text model beside the main one, in any fusion
READS = f"heads_{READER}/"  # how the paths of its parameters begin
# Towers that may begin with a run of another modality, where the run has none of their own.
DONORS = {"video": "image", "audio": "image"}
# What such a tower has of its own, and begins afresh.
OWN_OF_HEIR = re.compile(r"embedders_\w+/(time_positions|differences/.*)")
STEM_FIELDS = ("stem", "stem_options", "patch", "mean", "std")
# What may be other than in the run that a whole model comes from: none of it changes an embedding.
FREE_OF_MODEL = ("dropout", "remat", "attention", "unroll", "dtype", "exits")
FREE_OF_OBJECTIVE = ("weight", "weight_schedule", "chunk")
# What imported weights say nothing of: how sounds and clips are cut, and changed in training.
FREE_OF_IMPORTED = {
    "audio": ("mask_frames", "mask_mels", "gain", "speed", "equalise", "roll", "longer"),
    "video": ("seconds",),
}
SEEN = ("image_size", "resampling", "fit")  # fields of `config.data`: the pictures that it knows
BLOCK = re.compile(r"(.*/layers)/block_(\d+)/(.*)")
# A dense run's feed-forward becomes each expert (Komatsuzaki et al. 2022, "Sparse upcycling").
KIND = ("feed_forward_type", "feed_forward_options", "separate_feed_forward")
EXPERT = re.compile(r"(.*feed_forward)/experts_(\w+)/(\w+/(?:kernel|bias))")
OF_EXPERTS = re.compile(r".*feed_forward/(router_\w+|balance_\w+|shared_expert)(/.*)?")


def prefixes(part: str) -> tuple[str, ...]:
    """Returns the path prefixes of a part's parameters: all, a stem, the text model, or a tower."""
    if part == WHOLE:
        return ("",)
    if part == STEM:
        return ("embedders_image/stem/",)
    if part == READER:
        return (READS,)
    return f"embedders_{part}/", "transformer/" if part == "text" else f"towers_{part}/"


def config_from_run(config: ConfigDict, asked: Collection[str]) -> ConfigDict:
    """Returns the config with every field that the weights it starts from decide.

    Args:
      config: `model.start_from` names runs by part: 'whole', or text, 'stem' or a modality with a
        tower; '' for none.
      asked: fields that the command line set; these must agree with the weights.

    Raises:
      FileNotFoundError: no run there.
      ValueError: weights that the fusion cannot use, or a field that contradicts them.
    """
    chosen = ConfigDict(config.to_dict())
    begun = begun_parts(config)
    if WHOLE in begun and len(begun) > 1:
        raise ValueError(
            f"model.start_from.{WHOLE} leaves nothing to model.start_from."
            f"{next(part for part in begun if part != WHOLE)}: give one of them"
        )
    for part, run in begun.items():
        saved = saved_config(run, part, config.model.fusion)
        if part != READER and upcycles(config.model, saved["model"]):
            for name in KIND:
                saved["model"][name] = config.model.to_dict()[name]
        if part == WHOLE:
            take_whole(chosen, saved, run, asked)
            continue
        modality = {STEM: "image", READER: "text"}.get(part, part)
        if modality not in config.model.modalities or part in config.model.towers:
            raise ValueError(
                f"model.start_from.{part}: model.modalities must declare {modality}, and "
                "model.towers must not, for the weights decide its tower"
            )
        if part == STEM:
            taken = stem_of(saved, begun)
        elif part == READER:
            taken = reader_of(saved, run, config)
        else:
            taken = text_of(saved, run) if part == "text" else tower_of(saved, part)
        leave_begin_token(taken, asked)
        leave_shorter_sounds(taken, config, asked)
        for field, value in flatten_dict(taken, sep=".").items():
            refuse_contradiction(config, field, value, asked, f"{part}={run!r}")
        for field, value in taken.items():
            if field == "model.tower":  # what weights do not decide of it stays, such as attention
                value = config.model.tower.to_dict() | value
            set_field(chosen, field, value)
    return chosen


def upcycles(model: Any, saved: Mapping[str, Any]) -> bool:
    """Returns whether a model has experts in place of the dense feed-forward of a saved one."""
    kinds = (model.feed_forward_type, saved["feed_forward_type"])
    return kinds == ("experts", "dense")


def begun_parts(config: Any) -> dict[str, str]:
    """Returns the parts that start from other runs, and these runs."""
    named = {part: run for part, run in config.model.start_from.items() if run}
    return {part: run_of(run, cache_folder(config.data)) for part, run in named.items()}


def leave_begin_token(taken: dict[str, Any], asked: Collection[str]) -> None:
    """Leaves a begin token that the command line names to a model whose texts have had none."""
    field = "data.special_tokens.bos"
    if field in asked and taken.get(field) == "":
        del taken[field]


def leave_shorter_sounds(taken: dict[str, Any], config: ConfigDict, asked: Collection[str]) -> None:
    """Leaves fewer seconds, which the command line asks for, to a tower that hears more."""
    field = "model.modalities.audio.seconds"
    if field in asked and get_field(config, field) < taken.get(field, 0):
        del taken[field]


def refuse_contradiction(
    config: ConfigDict, field: str, value: Any, asked: Collection[str], start: str
) -> None:
    """Checks that the command line did not set a field to another value than the weights have.

    Raises:
      ValueError: it did.
    """
    if field not in asked:
        return
    given = get_field(config, field)
    if given != value and not (isinstance(given, tuple) and list(given) == value):
        raise ValueError(
            f"{field}={given!r}, but the weights of model.start_from.{start} have {value!r}: leave "
            "the field"
        )


def take_whole(
    chosen: ConfigDict, saved: Mapping[str, Any], run: str, asked: Collection[str]
) -> None:
    """Sets every field that the weights of a whole model decide.

    Raises:
      ValueError: the command line set one to another value.
    """
    groups = whole_of(saved, run)
    leave_begin_token(groups, asked)
    text = saved["model"]["modalities"]["text"]
    length = "model.modalities.text.length"
    if length in asked and not text["attend_padding"]:  # else padding would be other, and is seen
        groups["model.modalities"]["text"]["length"] = get_field(chosen, length)
    decided = flatten_dict(groups, sep=".")
    for field in asked:
        if field in decided:
            refuse_contradiction(chosen, field, decided[field], asked, f"{WHOLE}={run!r}")
        elif field.startswith(("model.modalities.", "model.towers.")):
            raise ValueError(
                f"{field}: the model of model.start_from.{WHOLE}={run!r} has no such part"
            )
    for name, options in saved["objectives"].items():
        field = f"objectives.{name}.weight"
        if options["weight"] <= 0:
            continue
        if options["type"] == "exits" and not chosen.model.exits:  # they are this run's own affair
            continue
        if name not in chosen.objectives:
            set_field(chosen, f"objectives.{name}", options)
        elif get_field(chosen, field) <= 0 and field not in asked:
            set_field(chosen, field, options["weight"])
    for group, value in groups.items():
        set_field(chosen, group, value)


def whole_of(saved: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Returns the fields and groups of fields that a whole model decides, by dotted name."""
    free = (*FREE_OF_MODEL, "start_from", "budget", "budget_by")
    found = {f"model.{name}": each for name, each in saved["model"].items() if name not in free}
    modalities = {name: dict(each) for name, each in saved["model"]["modalities"].items()}
    text = modalities["text"]
    text["max_positions"] = text["max_positions"] or text["length"]
    found["model.modalities"] = modalities
    for name, options in saved["objectives"].items():
        if options["weight"] > 0:
            found |= {
                f"objectives.{name}.{field}": value
                for field, value in options.items()
                if field not in FREE_OF_OBJECTIVE
            }
    if "image" in modalities:
        found |= {f"data.{name}": saved["data"][name] for name in SEEN}
    return found | tokens_of(saved, run)


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
    if part not in ("text", READER, STEM, WHOLE) and fusion == "early":
        raise ValueError(
            f"model.start_from.{part}: early fusion has no {part} tower; use fusion 'late' or "
            "'gated_cross_attention'"
        )
    if part not in ("text", READER, STEM, WHOLE) and saved["model"]["fusion"] == "early":
        raise ValueError(f"model.start_from.{part}={run!r} is early fusion and has no {part} tower")
    modalities = saved["model"]["modalities"]
    if part == STEM and modalities.get("image", {}).get("stem", PATCHES[0]) in PATCHES:
        raise ValueError(f"model.start_from.{part}={run!r} sees patches of images: it has no stem")
    if part == READER and "text" not in modalities:
        raise ValueError(f"model.start_from.{part}={run!r} reads no text")
    if part not in (WHOLE, STEM, READER, *modalities) and DONORS.get(part) not in modalities:
        raise ValueError(f"model.start_from.{part}={run!r} reads no {part}")
    held = saved.get("imported", {}).get("part", "both")
    part = donor_of(part, modalities)
    # Imported text is a whole model of texts; an image tower is no model yet.
    if held != "both" and part != held and not (part in (WHOLE, READER) and held == "text"):
        raise ValueError(
            f"model.start_from.{part}={run!r} holds weights of {held} alone: give it as "
            f"model.start_from.{held}"
        )
    return saved


def tokens_of(saved: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Returns the fields of the tokenizer that a run's weights know, by dotted name."""
    return {
        "data.tokenizer": str(RunFolder(run).tokenizer.absolute()),
        **{f"data.special_tokens.{name}": x for name, x in saved["data"]["special_tokens"].items()},
    }


def text_of(saved: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Returns the fields that a text model's weights decide, by dotted name."""
    model = saved["model"]
    text = {k: v for k, v in model["modalities"]["text"].items() if k not in ("type", "length")}
    contrastive = saved["objectives"]["contrastive"]
    return {
        # What a run without patterns saw, it sees with those of other modalities too.
        **{f"model.{name}": model[name] for name in STACK if name != "sparse" or model["sparse"]},
        **{f"model.modalities.text.{name}": value for name, value in text.items()},
        "model.modalities.text.max_positions": text["max_positions"]
        or model["modalities"]["text"]["length"],
        **tokens_of(saved, run),
        "data.special_tokens.image": "",  # a text model alone sees no picture
        "objectives.contrastive.text_pool": contrastive["text_pool"],
    }


def reader_of(saved: Mapping[str, Any], run: str, config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that the weights of a reader decide, by dotted name.

    It reads texts as long as the model's own, as far as it knows positions.

    Raises:
      ValueError: the run's text model has what no reader may have.
    """
    model, contrastive = saved["model"], saved["objectives"]["contrastive"]
    embeds = contrastive["weight"] > 0 and "text" in named_modalities(contrastive["between"], "")
    faults = {
        f"has {model['feed_forward_type']}": model["feed_forward_type"] != "dense",
        "has gated layers": model["fusion"] == "gated_cross_attention",
        "pools its texts by attention": contrastive["text_pool"] == "attention",
        "learned no contrast with texts": not embeds,
        "has a reader itself, which read its texts": contrastive["reader"],
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise ValueError(
            f"model.start_from.{READER}={run!r} {found[0]}: a reader is a text model of dense "
            "layers that embeds texts by a pool without parameters"
        )
    text = dict(model["modalities"]["text"])
    known = text["max_positions"] or text["length"]
    size = TextTokenizer.load(RunFolder(run).tokenizer, **saved["data"]["special_tokens"])
    text |= {
        "max_positions": known,
        # Padding that is read is a part of what was learned.
        "length": text["length"]
        if text["attend_padding"]
        else min(config.model.modalities.text.length, known),
        "vocabulary": text["vocabulary"] or size.vocabulary_size,
    }
    return {
        "model.reader": {
            **{name: model[name] for name in STACK},
            "text": text,
            "rule": contrastive["rule"],
            "pool": contrastive["text_pool"],
            "special_tokens": saved["data"]["special_tokens"],
        },
        "objectives.contrastive.reader": True,
    }


def stem_of(saved: Mapping[str, Any], begun: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields that the weights of a stem decide, by dotted name.

    Raises:
      ValueError: the whole image tower comes from a run too.
    """
    if "image" in begun:
        raise ValueError(
            f"model.start_from.image and model.start_from.{STEM} both say where the stem of images "
            "comes from: give one of them"
        )
    image = saved["model"]["modalities"]["image"]
    return {f"model.modalities.image.{name}": image[name] for name in STEM_FIELDS}


def donor_of(part: str, modalities: Collection[str]) -> str:
    """Returns the modality of a run whose tower a part begins with, most often its own."""
    return part if part in (*modalities, WHOLE, STEM) else DONORS.get(part, part)


def heir_of(saved: Mapping[str, Any], part: str, tower: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the weights of an image tower decide for another modality's.

    Raises:
      ValueError: the tower has what the other modality has not.
    """
    image = saved["model"]["modalities"]["image"]
    plain = {"stem": "linear", "class_token": False, "norm": False, "bias": True, "cut_rest": False}
    if part == "audio":
        del plain["class_token"]
    for name, value in plain.items():
        if image[name] != value:
            raise ValueError(
                f"model.start_from.{part}: the image tower of the run has {name}={image[name]!r}, "
                f"and {part} begins with towers of {name}={value!r} alone"
            )
    same = {name: image[name] for name in ("patch", "positions", "modality_embedding")}
    seen = {}
    if part == "audio":  # what it hears is normalised by its own mean and deviation
        patch, count = [image["patch"]] * 2, int(image["class_token"])
        same |= {"patch": patch, "class_tokens": count, "stem": "linear"}
    else:
        same |= {name: image[name] for name in ("mean", "std")}
        seen = {f"data.{name}": saved["data"][name] for name in SEEN}
    own = {f"model.modalities.{part}.{name}": value for name, value in same.items()}
    return {f"model.towers.{part}": tower, **own, **seen}


def tower_of(saved: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns the fields that the weights of a modality's tower decide, by dotted name."""
    model, data = saved["model"], saved["data"]
    donor = donor_of(part, model["modalities"])
    options = TransformerOptions.from_config(model).changed(model["tower"])
    options = options.changed(model["towers"].get(donor, {}))
    tower = {name: getattr(options, name) for name in STACK}
    if donor != part:
        return heir_of(saved, part, tower)
    imported = "imported" in saved
    free = ("type", *(FREE_OF_IMPORTED.get(part, ()) if imported else ()))
    modality = {k: v for k, v in model["modalities"][part].items() if k not in free}
    taken = {f"model.modalities.{part}.{name}": value for name, value in modality.items()}
    if part == "image" or (part == "video" and imported):
        taken |= {f"data.{name}": data[name] for name in SEEN}
    if part != "image":
        return {f"model.towers.{part}": tower, **taken}
    return {
        "model.tower": tower,
        **taken,
        "objectives.contrastive.pool": saved["objectives"]["contrastive"]["pool"],
    }


def weights_to_start_from(config: Config) -> dict[str, Any]:
    """Reads the parameters of the runs in `model.start_from`, by path, each block by its layer."""
    found: dict[str, Any] = {}
    for part, run in begun_parts(config).items():
        if part == READER:
            found |= {f"{READS}{path}": x for path, x in part_of_run(run, "text").items()}
            continue
        modalities = RunFolder(run).read_config(defaults())["model"]["modalities"]
        donor = donor_of(part, modalities)
        given = part_of_run(run, donor)
        options = config.model.modalities.get(part, {})
        if donor != part:
            given = {path.replace(f"_{donor}/", f"_{part}/", 1): x for path, x in given.items()}
            kernel = f"embedders_{part}/patches/kernel"
            if part == "audio":
                given |= heard(given, AudioModality.from_config(part, options, None))
            else:
                tubelet = int(options.get("tubelet", VideoModality.tubelet))
                given[kernel] = inflated(given[kernel], tubelet)
        elif part == "audio" and (positions := "embedders_audio/positions") in given:
            steps = AudioModality.from_config(part, options, None).grid[0]
            given[positions] = given[positions][:steps]  # of shorter sounds, the first ones
        found |= given
    return found


def heard(given: Mapping[str, Any], audio: AudioModality) -> dict[str, Any]:
    """Returns the parameters of an embedder of sounds, made from those of an embedder of images.

    Gong et al. 2021 (AST), section 2.2: kernels are averaged over the colours, and positions are
    resized. Columns become time, and rows bands.

    Args:
      given: of the image tower, by the paths of audio's.
      audio: the modality.
    """
    before = "embedders_audio"
    kernel = given[f"{before}/patches/kernel"]
    frames, bands = audio.patch
    kernel = kernel.reshape(bands, frames, 3, -1).mean(2).swapaxes(0, 1)
    found = {f"{before}/patches/kernel": kernel.reshape(frames * bands, -1)}
    if audio.positions != "none":
        table = jax.numpy.asarray(given[f"{before}/positions"].swapaxes(0, 1))
        found[f"{before}/positions"] = np.asarray(resize_positions(table, audio.grid))
    if audio.class_tokens:
        token, position = (given[f"{before}/class_{name}"] for name in ("token", "position"))
        found[f"{before}/class_tokens"] = (token + position)[None]
    return found


def news_of_start(params: Any, config: Config, found: Mapping[str, Any]) -> str:
    """Returns a line on where the weights of a new run come from; '' if all start afresh.

    Args:
      params: the new run's parameters, or their shapes.
      config: the new run's config.
      found: what `weights_to_start_from` returned.
    """
    if not (begun := begun_parts(config)):
        return ""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    fresh = {part_of(path) for path in paths if source_of(path, begun, found) is None}
    left = {part_of(path) for path in found} - {part_of(path) for path in paths}
    said = ", ".join(f"{part} from {run}" for part, run in begun.items())
    copies = any(is_upcycled(path, found) for path in paths)
    scaled = copies and config.model.feed_forward_options.get("gate", "scaled") == "scaled"
    return (
        f"starts with {said}; afresh: {', '.join(sorted(fresh)) or 'nothing'}"
        + f"; left out: {', '.join(sorted(left))}" * bool(left)
        + "; experts that begin as copies add up to what they are copied from with "
        "model.feed_forward_options.gate='normalised', and it is 'scaled'" * scaled
    )


def part_of(path: str) -> str:
    """Returns the part of a model that a parameter belongs to, as a summary names it."""
    top = path.split("/")[0]
    if experts := OF_EXPERTS.fullmatch(path):
        return f"{top}/layers/{experts[1]}"
    return "transformer/layers/cross" if "/cross/" in path else top


def is_upcycled(path: str, found: Mapping[str, Any]) -> bool:
    """Returns whether a parameter stands beside experts that begin as copies of a dense layer."""
    stack = f"{path.split('/')[0]}/"
    own = [name for name in found if name.startswith(stack) and "/feed_forward/" in name]
    dense = bool(own) and all("/feed_forward/mlp/" in name for name in own)
    return dense and OF_EXPERTS.fullmatch(path) is not None


def source_of(path: str, begun: Mapping[str, str], found: Mapping[str, Any]) -> str | None:
    """Returns the part in `begun` whose run has a parameter; None where it starts afresh."""
    if is_upcycled(path, found):
        return None
    if WHOLE in begun:  # a head that the run does not have is a new one
        top = path.split("/")[0]
        return WHOLE if any(name.startswith(f"{top}/") for name in found) else None
    if "/cross/" in path or (OWN_OF_HEIR.fullmatch(path) and path not in found):
        return None
    return next((part for part in begun if path.startswith(prefixes(part))), None)


def load_params(params: Any, config: Config, found: Mapping[str, Any]) -> Any:
    """Replaces the parameters that `weights_to_start_from` found; shardings stay.

    Args:
      params: the new run's parameters.
      config: the new run's config.
      found: what `weights_to_start_from` returned.

    Raises:
      ValueError: a parameter of the part that the run does not have, or of another shape.
    """

    begun = begun_parts(config)

    def one(key_path: Any, leaf: Any) -> Any:
        path = path_of(key_path)
        if is_upcycled(path, found) and "/shared_expert/down/" in path:
            return leaf * 0  # so that the first step is that of the dense model
        part = source_of(path, begun, found)
        if part is None:
            return leaf
        run = begun[part]
        value = _restacked(found, path, leaf.shape)
        if value is None and (expert := EXPERT.fullmatch(path)):
            value = _each_expert(found, expert, leaf.shape)
        if value is None or value.shape != leaf.shape:
            has = "nothing" if value is None else f"{list(value.shape)}"
            raise ValueError(
                f"{path}: this model needs {list(leaf.shape)}, model.start_from.{part}={run!r} has "
                f"{has}"
            )
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, params)


def _each_expert(found: Mapping[str, Any], expert: re.Match[str], shape: tuple[int, ...]) -> Any:
    """Returns the dense map at the place of a pool of experts once for each of them, or None."""
    before, pool, after = expert.groups()
    periods, experts, *_ = shape
    for modality in ("shared", pool):
        value = _restacked(found, f"{before}/mlp/{modality}/{after}", shape)
        if value is not None:
            return np.broadcast_to(value[:, None], (periods, experts, *value.shape[1:]))
    return None


def part_of_run(run: str, part: str) -> dict[str, Any]:
    """Reads a part of a run's newest checkpoint: NumPy arrays by path, each block by its layer."""
    return _by_layer(leaves_of_run(run, part))


def leaves_of_run(run: str, part: str) -> dict[str, Any]:
    """Reads a part of a run's newest checkpoint: NumPy arrays by path, as they are there."""
    folder = RunFolder(run)
    saved = folder.read_config(defaults())
    config = Config(saved)
    if folder.tokenizer.is_file():
        tokenizer = load_tokenizer(folder.tokenizer, config)
    else:  # an image tower has none, and its shapes depend on none
        tokenizer = TextTokenizer.train([], 260)
    shapes = without_names(saved_shapes(build_task(config, tokenizer), config))
    paths, own = flatten_dict(shapes, sep="/"), prefixes(part)
    wanted = unflatten_dict({path: x for path, x in paths.items() if path.startswith(own)}, sep="/")
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        name = "average" if keeps_average(saved["train"]) else "params"
        restored = checkpoints.restore({name: wanted}, partial=True)
    leaves = jax.tree_util.tree_leaves_with_path(dequantized(restored.state[name]))
    return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


def _by_layer(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Splits stacked blocks: `.../layers/block_1/x` [periods, ...] to `.../layers/<layer>/x`."""
    blocks: dict[str, set[str]] = {}  # of each stack, whose periods may be of other lengths
    for each in filter(None, map(BLOCK.fullmatch, leaves)):
        blocks.setdefault(each[1], set()).add(each[2])
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        match = BLOCK.fullmatch(path)
        if match is None:
            found[path] = leaf
            continue
        before, block, after = match[1], int(match[2]), match[3]
        for period in range(leaf.shape[0]):
            found[f"{before}/{period * len(blocks[before]) + block}/{after}"] = leaf[period]
    return found


def _restacked(found: Mapping[str, Any], path: str, shape: tuple[int, ...]) -> Any:
    """Returns the leaf that belongs at `path`, its layers stacked again, or None."""
    match = BLOCK.fullmatch(path)
    if match is None:
        return found.get(path)
    before, block, after = match[1], int(match[2]), match[3]
    # A block's layers may differ in what they have: all are counted.
    starts = (name for name in found if name.startswith(f"{before}/"))
    numbers = (name.removeprefix(f"{before}/").split("/")[0] for name in starts)
    layers = {number for number in numbers if number.isdigit()}
    blocks = max(1, len(layers) // shape[0])
    names = [f"{before}/{period * blocks + block}/{after}" for period in range(shape[0])]
    if len(layers) != shape[0] * blocks or any(name not in found for name in names):
        return None
    return np.stack([found[name] for name in names])
