"""Tiny tasks, batches and data that many tests share."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unified_mm.config import Config
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import default_config
from unified_mm.files import write_json
from unified_mm.objectives.pair_losses import SOFTMAX_START
from unified_mm.parallel.sharding import path_of, without_names
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder
from unified_mm.task import Task, build_task
from unified_mm.training.state import TrainState

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
TEXTS = [f"a {colour} square of size {n}" for colour in COLOURS for n in range(4)]


def config_dict(**changes: Any) -> Any:
    """The default config, shrunk; `changes` are dotted fields with `__` for the dot."""
    config = default_config()
    config.update(
        {
            "data": {"image_size": 16, "vocabulary_size": 300, "threads": 1},
            "model": {"width": 16, "layers": 2, "heads": 2, "feed_forward": 32},
            "train": {"steps": 4, "batch_size": 8, "warmup_steps": 1, "learning_rate": 1e-3},
            "evaluation": {"batch_size": 8},
            "logging": {"every": 2, "tensorboard": False},
            "checkpoint": {"every": 2},
        }
    )
    config.model.modalities.text.length = 12
    config.objectives.contrastive.width = 8
    config.objectives.matching.weight = 1.0
    for field, value in changes.items():
        node = config
        *parents, last = field.split("__")
        for name in parents:
            node = node[name]
        node[last] = value
    return config


@functools.cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 300)


def task(**changes: Any) -> Task:
    return build_task(Config(config_dict(**changes).to_dict()), tokenizer())


SHAPES: dict[str, Any] = {}  # of parameters by the task's text: tracing takes half a second


def drawn(task: Task, seed: int) -> Any:
    """Parameters without boxes, spread as an initialised model's; biases and scales moved, too.

    Drawn by NumPy: to compile `task.init` takes longer than most tests.
    """
    rng = np.random.default_rng(seed)
    if repr(task) not in SHAPES:
        SHAPES[repr(task)] = without_names(task.abstract_params())

    def one(path: Any, leaf: Any) -> np.ndarray:
        *_, last = path_of(path).split("/")
        start = {"scale": 1.0, "log_scale": SOFTMAX_START}.get(last, 0.0)
        if last.endswith("gate"):
            start = task.model.options.cross.start
        spread = 0.25 if last == "kernel" else 0.1
        return np.asarray(start + spread * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, SHAPES[repr(task)])


def params(task: Task, seed: int = 0) -> Any:
    """The drawn parameters on a device."""
    return jax.tree.map(jnp.asarray, drawn(task, seed))


def writing_params(task: Task, end: int, seed: int = 1) -> Any:
    """Parameters of a model that writes varied tokens, and `end` among them."""
    tree = drawn(task, seed)
    # What was read counts for more than the last token, which the tied table would repeat.
    tree["transformer"]["layers"] = jax.tree.map(lambda x: 4 * x, tree["transformer"]["layers"])
    tree["embedders_text"]["tokens"][end] *= 2.0
    return jax.tree.map(jnp.asarray, tree)


def loaded(seed: int = 1, **changes: Any) -> Any:
    """A model that writes varied texts, as `unified_mm.load` would give it."""
    from unified_mm.inference.loaded import LoadedModel, one_device_mesh

    config = config_dict(objectives__matching__weight=0.0, **changes)
    built = task(objectives__matching__weight=0.0, **changes)
    tree = writing_params(built, built.tokenizer.eos_id, seed)
    return LoadedModel(built, tree, one_device_mesh(), Config(config.to_dict()), 1)


def batch(task: Task, size: int = 4, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Whole examples: random pixels, random texts of different lengths."""
    rng = np.random.default_rng(seed)
    image, text = task.modalities["image"], task.modalities["text"]
    lengths = rng.integers(4, text.length + 1, size)
    valid = np.arange(text.length) < lengths[:, None]
    arrays = {
        "image": {
            "pixels": rng.uniform(0, 255, (size, image.size, image.size, 3)).astype(np.float32),
            "present": np.ones(size, bool),
        },
        "text": {
            "ids": np.where(valid, rng.integers(4, text.embedding.used, valid.shape), 0).astype(
                np.int32
            ),
            "valid": valid,
            "scored": valid & (np.arange(text.length) > 0),
            "prompted": np.zeros(size, bool),
            "present": np.ones(size, bool),
        },
    }
    return jax.tree.map(jnp.asarray, arrays)


def write_coco(folder: Path, train: int = 24, val: int = 8) -> Path:
    """A folder in COCO layout: coloured squares with two captions each."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        (folder / "images" / split).mkdir(parents=True)
        for number in range(count):
            colour = list(COLOURS)[number % 3]
            pixels = rng.integers(0, 40, (20, 24, 3)) + 100
            side = 4 + number % 4
            pixels[4 : 4 + 2 * side, 4 : 4 + 2 * side] = COLOURS[colour]
            name = f"{split}/{number}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "width": 24, "height": 20})
            annotations += [
                {"id": 2 * number + i, "image_id": number, "caption": caption}
                for i, caption in enumerate(
                    (f"a {colour} square of size {number % 4}", f"{colour}, size {number % 4}")
                )
            ]
        content = {"images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return folder


def state(params: Any, step: int, average: Any = None) -> TrainState:
    """A state of training at a step, its optimizer's no more than a count."""
    return TrainState(
        step=jnp.array(step, jnp.int32),
        params=params,
        optimizer={"count": jnp.zeros((), jnp.int32)},
        average=average,
        key=jax.random.key(0),
        bad_step=jnp.array(-1, jnp.int32),
    )


def write_run(path: Path, config: Any, params: Any, average: Any = None, step: int = 7) -> Path:
    """A run's folder with one checkpoint."""
    folder = RunFolder(path)
    write_json(folder.config, config.to_dict())
    tokenizer().save(folder.tokenizer)
    with Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(step, state(params, step, average), {"step": step})
    return path


def write_world_run(path: Path) -> Path:
    """A run on a small world with checkpoints of two steps, nothing in it trained."""
    changes = {
        "data__source": "world",
        "data__world": {"train": 40, "val": 20, "test_composition": 2, "seed": 0},
        "objectives__matching__weight": 0.0,
    }
    built = task(**changes)
    for seed in (1, 2):
        tree = writing_params(built, built.tokenizer.eos_id, seed)
        write_run(path, config_dict(**changes), tree, step=7 * seed)
    return path


def documents(task: Task, seed: int = 0, length: int = 14) -> dict[str, dict[str, Any]]:
    """Two rows of packed documents: text, image, text, image, text | image, text (and swapped).

    Three image slots; the order is in `position` and `segment` alone.
    """
    rng = np.random.default_rng(seed)
    size = task.modalities["image"].size
    first = ["text", "text", "image", "text", "text", "image", "text", "text"]
    second = ["image", "text", "text", "text"]
    rows = [_laid_out(pair, 3, length) for pair in ([first, second], [second, first])]
    image = {key: np.stack([row[0][key] for row in rows]) for key in rows[0][0]}
    text = {key: np.stack([row[1][key] for row in rows]) for key in rows[0][1]}
    image["pixels"] = rng.uniform(0, 255, (2, 3, size, size, 3)).astype(np.float32)
    used = task.modalities["text"].embedding.used
    text["ids"] = rng.integers(4, used, text["valid"].shape).astype(np.int32)
    text["scored"] = text["valid"] & (text["text_position"] > 0)
    text["prompted"], text["present"] = np.zeros(2, bool), np.ones(2, bool)
    return jax.tree.map(jnp.asarray, {"image": image, "text": text})


def _laid_out(documents: list[list[str]], slots: int, length: int) -> tuple[dict, dict]:
    """Where each image and each text token of the documents is, one by one."""
    images, tokens = [], []
    for number, parts in enumerate(documents):
        seen = place = 0
        for position, part in enumerate(parts):
            if part == "image":
                seen += 1
                images.append({"position": position, "segment": seen, "document": number})
            else:
                tokens.append(
                    {
                        "position": position,
                        "segment": seen,
                        "document": number,
                        "text_position": place,
                    }
                )
                place += 1
    nowhere = {"position": 0, "segment": 0, "document": -1}

    def columns(items: list[dict], width: int, unused: dict) -> dict[str, np.ndarray]:
        filled = items + [unused] * (width - len(items))
        return {key: np.array([item[key] for item in filled], np.int32) for key in unused}

    image = columns(images, slots, nowhere)
    text = columns(tokens, length, {**nowhere, "text_position": 0})
    image["present"] = np.arange(slots) < len(images)
    text["valid"] = np.arange(length) < len(tokens)
    return image, text


def replace_model(task: Task, **changes: Any) -> Task:
    """The task with other options of its model's transformers."""
    return replace(task, model=task.model.with_options(**changes))
