"""Mixtures of sounds: what is in them, and from which folds."""

import csv

import numpy as np
import pytest

from experiments import surroundings
from unified_mm.data import sounds
from unified_mm.world.tones import write_wave

pytest.importorskip("soundfile")
TONES = {"dog": 500, "rain": 1000, "clock": 2000}  # whole periods in a second


@pytest.fixture
def clips(tmp_path):
    """Two folds of three classes, each a tone of its own, fold 2 a quarter higher."""
    folder = tmp_path / "esc10"
    (folder / "audio").mkdir(parents=True)
    rows = ["filename,fold,category"]
    times = np.arange(round(surroundings.SECONDS * sounds.RATE)) / sounds.RATE
    for fold in ("1", "2"):
        for name, tone in TONES.items():
            pitch = tone * (1.25 if fold == "2" else 1.0)
            file = f"{fold}-{name}.wav"
            write_wave(folder / "audio" / file, 0.3 * np.sin(2 * np.pi * pitch * times))
            rows.append(f"{file},{fold},{name}")
    (folder / "esc10.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_mixture_holds_what_its_labels_say_and_nothing_of_the_other_split(
    clips, tmp_path, monkeypatch
):
    monkeypatch.setattr(surroundings, "COUNTS", {"train": 12, "val": 6})
    out = tmp_path / "out"
    surroundings.write_mixtures(clips, "2", out)
    sizes = set()
    for split, factor in (("train", 1.0), ("val", 1.25)):
        with (out / split / "metadata.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == {"train": 12, "val": 6}[split]
        for row in rows:
            wave = sounds.decode(out / split / row["file_name"]) / 32768
            assert len(wave) == 5 * sounds.RATE
            assert np.abs(wave).max() <= surroundings.LOUDEST + 1e-3
            power = np.abs(np.fft.rfft(wave))  # five seconds: a bin is a fifth of a hertz
            labels = row["labels"].split(";")
            sizes.add(len(labels))
            heard = {name: power[round(5 * tone * factor)] for name, tone in TONES.items()}
            quietest = min(heard[name] for name in labels)
            assert quietest > 10 ** (-13 / 20) * max(heard.values())  # 12 dB apart at most
            assert all(heard[name] < 0.01 * quietest for name in TONES if name not in labels)
            others = [power[round(5 * tone * (2.25 - factor))] for tone in TONES.values()]
            assert max(others) < 0.01 * quietest
    assert sizes == {1, 2, 3}
    with pytest.raises(ValueError, match="--held_out=7: .* has no such fold"):
        surroundings.write_mixtures(clips, "7", out)
