"""The sounds that are made: the same each time, and read as a folder of classes."""

import numpy as np
import pytest

from unified_mm.data.sources import find_sounds
from unified_mm.default_config import default_config
from unified_mm.world import tones


def test_a_sound_is_a_function_of_its_class_and_seed():
    for kind in tones.CLASSES:
        one, other = tones.sound(kind, 3), tones.sound(kind, 3)
        np.testing.assert_array_equal(one, other)
        assert 8000 <= len(one) <= 16_000 and 0.05 < np.abs(one).max() <= 1.0
    rising, falling = tones.sound("rising sweep", 1), tones.sound("falling sweep", 1)

    def crossings(x):
        return int((np.diff(np.sign(x)) != 0).sum())

    half = len(rising) // 2
    assert crossings(rising[half:]) > 1.5 * crossings(rising[:half])
    assert crossings(falling[half:]) < crossings(falling[:half]) / 1.5


def test_they_are_what_is_read_without_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    monkeypatch.setattr(tones, "SOUNDS", {"train": 2, "val": 1})
    data = default_config().data
    data.update({"source": "sounds", "cache_dir": str(tmp_path)})
    source = find_sounds(data)
    assert "SOUNDS THAT ARE MADE" in source.banner.upper() and source.name == "tones"
    assert {name: len(source.manifest(name).records) for name in source.splits()} == {
        "train": 12,
        "val": 6,
    }
    assert {r.labels for r in source.manifest("val").records} == {(c,) for c in tones.CLASSES}
    again = find_sounds(data)
    assert again.manifest("val").fingerprint == source.manifest("val").fingerprint
