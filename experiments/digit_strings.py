"""Speech to text: does the captioner or CTC hear strings of spoken digits better?

    python -m experiments.digit_strings --digits=FSDD --out=data/takes
    python -m experiments.digit_strings --digits=FSDD --out=data/george --leave_out=george
    python -m unified_mm.main --config=experiments/digit_strings.py:both \
        --config.data.dir=data/takes '--config.data.negatives_of=ESC10/audio/[123]-*' \
        '--config.evaluation.negatives_of=ESC10/audio/4-*' --workdir=runs/takes

FSDD is a folder of `fsdd.csv` (filename, digit, speaker, take) and `audio/`. A string is two to
five digits of one speaker. Held out are the takes 5 to 9 of all, or all of a speaker. `captioner`
and `ctc` learn one of the objectives, `both` both on one encoder. Each must write nothing about
silence, noise and sounds in which nobody speaks, of which it has heard others.

Expected: CTC, which must put digits in their order, needs fewer steps; the captioner, which learns
what follows what, loses more on a speaker it has not heard.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from unified_mm.cli.recipes import load_recipe
from unified_mm.data import sounds
from unified_mm.world.tones import DIGITS, write_wave

RECIPE = str(Path(__file__).parents[1] / "configs" / "audio.py")
COUNTS = {"train": 8000, "val": 300}
HELD_OUT = range(5, 10)  # takes
SECONDS = 4.0
WEIGHTS = {"captioner": (1.0, 0.0), "ctc": (0.0, 1.0), "both": (1.0, 1.0)}


def get_config(kind: str) -> ConfigDict:
    """Returns the config of `captioner`, `ctc` or `both`."""
    if kind not in WEIGHTS:
        raise ValueError(f"{kind!r}: give one of {', '.join(WEIGHTS)}")
    config: ConfigDict = load_recipe(RECIPE).get_config("speech")
    config.objectives.captioning.weight, config.objectives.transcription.weight = WEIGHTS[kind]
    config.objectives.transcription.update({"units": "words", "slots": 1})
    config.model.modalities.audio.update({"seconds": SECONDS, "patch": (8, 64), "speed": 1.3})
    config.model.modalities.audio.update({"mask_frames": 20, "mask_mels": 8})
    config.data.negatives = 0.15
    config.train.update({"steps": 1200, "optimizer": "muon", "learning_rate": 8e-3})
    config.evaluation.update({"negatives": 240, "best_by": ""})
    return config


def write_strings(digits: Path, out: Path, leave_out: str) -> None:
    """Writes the strings of both splits, each with a `metadata.csv`.

    Raises:
      ValueError: a speaker of whom there is no digit.
    """
    with (digits / "fsdd.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if leave_out and leave_out not in {row["speaker"] for row in rows}:
        raise ValueError(f"--leave_out={leave_out}: {digits} has no such speaker")

    def held_out(row: Mapping[str, str]) -> bool:
        return row["speaker"] == leave_out if leave_out else int(row["take"]) in HELD_OUT

    # In the order of the files: the strings are of the seed alone.
    for seed, (split, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(seed)
        kept = [row for row in rows if held_out(row) == (split == "val")]
        speakers = sorted({row["speaker"] for row in kept})
        waves = {row["filename"]: sounds.decode(digits / "audio" / row["filename"]) for row in kept}
        (out / split).mkdir(parents=True)
        lines = ["file_name,text"]
        for number in range(count):
            own = [row for row in kept if row["speaker"] == speakers[rng.integers(len(speakers))]]
            chosen = [own[rng.integers(len(own))] for _ in range(rng.integers(2, 6))]
            wave = joined([waves[row["filename"]] for row in chosen], rng)
            write_wave(out / split / f"{number}.wav", wave)
            text = " ".join(DIGITS[int(row["digit"])] for row in chosen)
            lines.append(f"{number}.wav,{text}")
        (out / split / "metadata.csv").write_text("\n".join(lines) + "\n")


def joined(waves: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Returns sounds one after another, in -1..1, with pauses and some noise."""
    pause = [np.zeros(int(rng.uniform(0.02, 0.15) * sounds.RATE)) for _ in range(len(waves) + 1)]
    parts = [pause[0]]
    for wave, after in zip(waves, pause[1:], strict=True):
        parts += [wave / max(1.0, float(np.abs(wave.astype(float)).max())) * 0.5, after]
    found = np.concatenate(parts)
    return found + rng.normal(size=len(found)) * 10 ** rng.uniform(-4, -2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--digits", type=Path, required=True, help="the folder of fsdd.csv")
    parser.add_argument("--out", type=Path, required=True, help="where the strings are written")
    parser.add_argument("--leave_out", default="", help="a speaker to hold out")
    options = parser.parse_args()
    write_strings(options.digits, options.out, options.leave_out)


if __name__ == "__main__":
    main()
