"""Half of the pictures are noise: are these sent away, and the others kept?

    python -m unified_mm.main --config=experiments/planted_noise.py --workdir=runs/noise
    python -m unified_mm.calibrate --run=runs/noise --pictures --tolerance=0.02
    python -m experiments.planted_noise --run=runs/noise --output=noise.json

The embedded world, in which every other picture is noise and a fifth of the training's have none
at all, so that captions are learned without one. The threshold is found on `val`; what is printed
is of `test_composition`, which nothing was fitted to: shares of the noise sent away and of the
pictures kept, what captions lose, and the seconds of writing them with and without it.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from experiments.recipe import get_config as get_recipe
from unified_mm.data.records import Manifest, Record, Stored

SPLIT = "test_composition"
WITHOUT = 5  # of so many pictures of training, one is left out


def get_config() -> ConfigDict:
    """Returns the config: captions alone, for what two CPU cores train in minutes."""
    config = get_recipe("tiny")
    config.data.source = "experiments.planted_noise:noisy_world"
    config.objectives.contrastive.weight = 0.0
    config.train.optimizer = "muon"
    config.train.learning_rate = 1e-2
    config.train.steps = 600
    config.train.warmup_steps = 30
    config.evaluation.max_images = 1000
    config.evaluation.also = ()
    return config


@dataclass(frozen=True)
class Noise:
    """A store of pictures of noise.

    Attributes:
      size: pixels on a side.
    """

    size: int

    def __getitem__(self, number: int, /) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (self.size, self.size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class NoisyWorld:
    """The embedded world with noise in the place of every other picture."""

    world: Any
    noise: Noise

    @property
    def name(self) -> str:
        return "noisy_world"

    @property
    def folder(self) -> str:
        return str(self.world.folder)

    @property
    def banner(self) -> str | None:
        return None if self.world.banner is None else str(self.world.banner)

    def splits(self) -> Sequence[str]:
        """Returns the names of the splits."""
        names: Sequence[str] = self.world.splits()
        return names

    def manifest(self, split: str) -> Manifest:
        """Returns the examples of a split, half of them beside noise."""
        found = self.world.manifest(split)
        records = tuple(
            self._planted(number, record, split) for number, record in enumerate(found.records)
        )
        return replace(
            found, records=records, source=self.name, fingerprint=f"{found.fingerprint}-noise"
        )

    def _planted(self, number: int, record: Record, split: str) -> Record:
        parts = dict(record.parts)
        if split == "train" and number % WITHOUT == 0:
            del parts["image"]
        elif is_noise(number):
            # Other noise in each split, else that of training would be known by heart.
            seed = number + 1_000_000 * list(self.splits()).index(split)
            parts["image"] = Stored(self.noise, seed, f"noise_{seed}.png", 0)
        return replace(record, parts=parts)


def is_noise(number: int) -> bool:
    """Returns whether a split's example has noise for its picture."""
    return number % 2 == 1


def noisy_world(data: Any) -> NoisyWorld:
    """Returns the data source."""
    from unified_mm.data.sources import embedded_world

    return NoisyWorld(embedded_world(data), Noise(int(data.image_size)))


def main() -> None:
    """Prints what a calibrated run does with the noise, and keeps it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    import unified_mm
    from unified_mm.benchmarks.timing import provenance
    from unified_mm.data.sources import open_source
    from unified_mm.files import write_json
    from unified_mm.inference.worth import PICTURE

    model = unified_mm.load(given.run, exits=True)
    if PICTURE not in model.predictor.exits:
        raise SystemExit(f"{given.run} was calibrated without --pictures")
    records = open_source(model.config.data).manifest(SPLIT).records[: given.images]
    size = model.config.evaluation.batch_size
    predictor = model.predictor
    noise = np.array([is_noise(number) for number in range(len(records))])
    worth = np.array(predictor.over(records, size, predictor.worths))
    read = worth >= predictor.exits[PICTURE]
    first = [replace(record, texts=record.texts[:1]) for record in records]
    beside = per_token(predictor, first, size)
    nothing = [replace(record, parts={}) for record in first]
    chosen = np.where(read, beside, per_token(predictor, nothing, size))
    seconds = {}
    for name, one in (("all", predictor.leaving({})), ("calibrated", predictor)):
        captions(one, records[:size], size)  # compiles
        began = time.perf_counter()
        captions(one, records, size)
        seconds[name] = round(time.perf_counter() - began, 2)
    found = {
        "images": len(records),
        "noise_sent_away": float((~read)[noise].mean()),
        "pictures_kept": float(read[~noise].mean()),
        "worth_of_noise": float(worth[noise].mean()),
        "worth_of_pictures": float(worth[~noise].mean()),
        "nats": {"all": float(beside.mean()), "calibrated": float(chosen.mean())},
        "seconds_of_captions": seconds,
        **provenance(),
    }
    print(json.dumps(found))
    if given.output:
        write_json(given.output, found)


def captions(predictor: Any, records: Sequence[Record], size: int) -> list[Any]:
    """Returns a caption of each record."""
    found: list[Any] = predictor.over(
        records, size, lambda batch: predictor.generate(batch, [""] * size)
    )
    return found


def per_token(predictor: Any, records: Sequence[Record], size: int) -> np.ndarray:
    """Returns the nats a token of each record's first caption."""
    scored = np.array(predictor.over(records, size, predictor.log_likelihood))
    found: np.ndarray = -scored[:, 0] / scored[:, 1]
    return found


if __name__ == "__main__":
    main()
