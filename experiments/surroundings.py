"""Sounds of the surroundings: which of ten each is, and which are heard together.

    python -m unified_mm.main --config=experiments/surroundings.py:classes --config.data.dir=ESC10 \
        --config.data.val_rows=fold=1 --workdir=runs/fold_1
    python -m experiments.surroundings --data=ESC10 --held_out=4 --out=data/together
    python -m unified_mm.main --config=experiments/surroundings.py:tags \
        --config.data.dir=data/together --workdir=runs/tags

ESC10 is a folder of `esc10.csv` (filename, fold, category) and `audio/`. The second command adds up
to three clips to each other, of different classes, each begun anywhere and up to 6 dB louder or
softer than the first: 1,200 mixtures of the other folds and 200 of the one that is held out.

A mixture's tags are found by chance with a mean average precision of about 0.18.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe
from unified_mm.data import sounds
from unified_mm.world.tones import write_wave

RECIPE = str(Path(__file__).parents[1] / "configs" / "audio.py")
COUNTS = {"train": 1200, "val": 200}
MOST = 3  # clips of a mixture
DECIBELS = 6.0
SECONDS = 5.0
LOUDEST = 0.9  # of a mixture that would be cut off


def get_config(what: str = "classes") -> ConfigDict:
    """Returns the config that learns `classes` of clips or `tags` of mixtures."""
    if what not in ("classes", "tags"):
        raise ValueError(f"{what!r}: give classes or tags")
    config: ConfigDict = load_recipe(RECIPE).get_config("tiny")
    audio = config.model.modalities.audio
    audio.update({"seconds": SECONDS, "patch": (8, 64), "roll": True})
    audio.update({"mask_frames": 80, "mask_mels": 12})
    config.model.dropout = 0.1
    config.train.update({"steps": 700, "batch_size": 32})
    if what == "tags":
        config.objectives.classification.update({"many": True, "smoothing": 0.0, "mix": 0.5})
    return config


def write_mixtures(folder: Path, held_out: str, out: Path) -> None:
    """Writes the mixtures of both splits, each with a `metadata.csv`.

    Raises:
      ValueError: a fold of which there is no clip.
    """
    with (folder / "esc10.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if held_out not in {row["fold"] for row in rows}:
        raise ValueError(f"--held_out={held_out}: {folder} has no such fold")
    # In the order of the splits: the mixtures are of the seed alone.
    for seed, (split, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(seed)
        kept = [row for row in rows if (row["fold"] == held_out) == (split == "val")]
        waves = [sounds.decode(folder / "audio" / row["filename"]) for row in kept]
        (out / split).mkdir(parents=True)
        lines = ["file_name,labels"]
        for number in range(count):
            chosen: dict[str, int] = {}
            for index in rng.permutation(len(kept))[: rng.integers(1, MOST + 1)]:
                chosen.setdefault(kept[index]["category"], int(index))
            write_wave(
                out / split / f"{number}.wav", together([waves[i] for i in chosen.values()], rng)
            )
            lines.append(f"{number}.wav,{';'.join(sorted(chosen))}")
        (out / split / "metadata.csv").write_text("\n".join(lines) + "\n")


def together(waves: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Returns the sum of sounds, in -1..1, each turned round in time and as loud as drawn."""
    total = np.zeros(round(SECONDS * sounds.RATE))
    for wave in waves:
        heard = np.zeros_like(total)
        heard[: len(wave)] = wave[: len(heard)]
        loudness = max(float(np.sqrt(np.mean(heard**2))), 1e-6)
        gain = 10 ** (rng.uniform(-DECIBELS, DECIBELS) / 20)
        total += np.roll(heard, rng.integers(len(heard))) * gain * 0.05 / loudness
    return total * min(1.0, LOUDEST / max(float(np.abs(total).max()), 1e-6))


def main() -> None:
    """Writes the mixtures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held_out", required=True, help="the fold that is not learned from")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write_mixtures(given.data, given.held_out, given.out)


if __name__ == "__main__":
    main()
