"""How much is measured: on an accelerator, or shrunk for a rehearsal on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.accelerator.schedule import Results
from unified_mm.cli.recipes import recipe_config, recipe_file
from unified_mm.config import Config, set_field


@dataclass(frozen=True)
class Scale:
    """The sizes of what is measured.

    Attributes:
      large, base: fields of these sizes of the recipe that are other than it has them.
      world: fields of the training on the world, beside those of `base`.
      first_batch: examples that `large` is compiled for to see what one takes.
      most_batch: the most that it is trained with.
      multiple: of examples, that a batch is rounded down to.
      memory: bytes of the device, where it does not tell.
      steps, turns: training steps of a turn, and turns.
      ladder_batch: examples of `base`.
      tokens, repeats: tokens of a timed text, and how often it is written.
      batch: texts written at once, beside one alone.
      lengths: tokens of a picture and of a text, under every rule.
      pictures: scenes of `picture_size` pixels on a side that the loader reads.
      scored: pictures whose captions are scored.
    """

    large: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    world: Mapping[str, Any] = field(default_factory=dict)
    first_batch: int = 64
    most_batch: int = 512
    multiple: int = 32
    memory: int = 2**31
    steps: int = 5
    turns: int = 6
    ladder_batch: int = 256
    tokens: int = 128
    repeats: int = 5
    batch: int = 32
    lengths: tuple[int, int] = (196, 64)
    pictures: int = 512
    picture_size: int = 480
    scored: int = 500


@dataclass(frozen=True)
class Setting:
    """What a part is measured by.

    Attributes:
      scale: how much.
      results: what was found so far.
      work: a folder for runs and scenes.
    """

    scale: Scale
    results: Results
    work: Path


# As many patches as at 224 pixels, of pictures that are rendered in seconds.
WORLD = {
    "data.source": "world",
    "data.image_size": 112,
    "data.crop_scale": (0.85, 1.0),
    "data.crop_ratio": (0.95, 1.05),
    "model.modalities.image.patch": 8,
    "data.world": {"train": 12000, "val": 500, "test_composition": 100, "seed": 0},
    "train.steps": 1200,
    "train.batch_size": 128,
    "checkpoint.every": 400,
    "evaluation.also": (),
    "logging.tensorboard": False,
}
SMALL = {
    "data.image_size": 32,
    "data.vocabulary_size": 300,
    "model.width": 32,
    "model.layers": 2,
    "model.heads": 4,
    "model.feed_forward": 64,
    "model.modalities.text.length": 16,
    "objectives.contrastive.width": 16,
}
FULL = Scale(world=WORLD)
SHRUNK = Scale(
    large=SMALL,
    base=SMALL,
    world={
        **WORLD,
        "data.image_size": 32,
        "data.world": {"train": 40, "val": 12, "test_composition": 4, "seed": 0},
        "train.steps": 4,
        "train.batch_size": 8,
        "evaluation.batch_size": 8,
    },
    first_batch=4,
    most_batch=8,
    multiple=4,
    steps=1,
    turns=1,
    ladder_batch=4,
    tokens=6,
    repeats=1,
    batch=2,
    lengths=(12, 8),
    pictures=6,
    picture_size=48,
    scored=4,
)


def largest_batch(step: Mapping[str, int], room: float, scale: Scale) -> int:
    """Returns the largest batch that fits, from what the step of a smaller one holds.

    All that is no state is taken to grow with the batch, so the batch is rather too small.

    Args:
      step: its `batch`, and its `held_bytes` with the `state_bytes` among them.
      room: bytes for all.
      scale: has what it is a multiple of, and the most.

    Raises:
      ValueError: not even the smallest fits.
    """
    each = (step["held_bytes"] - step["state_bytes"]) / step["batch"]
    count = int((room - step["state_bytes"]) / each) // scale.multiple * scale.multiple
    if count < scale.multiple:
        raise ValueError(
            f"{room:,.0f} bytes hold no batch of {scale.multiple}: the state takes "
            f"{step['state_bytes']:,}, an example {each:,.0f}"
        )
    return min(count, scale.most_batch)


def config_of(size: str, changes: Mapping[str, Any], **more: Any) -> Config:
    """Returns a size of the recipe with other values of some fields, by their dotted names.

    Args:
      size: 'base' or 'large'.
      changes: values by name.
      more: further ones of `model`.
    """
    config = recipe_config(recipe_file(f"coco:{size}"))
    for name, value in {
        **changes,
        **{f"model.{name}": each for name, each in more.items()},
    }.items():
        set_field(config, name, value)
    return Config(config.to_dict())
