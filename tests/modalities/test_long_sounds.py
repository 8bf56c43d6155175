"""Sounds longer than the model hears are embedded whole; all of one is read once, at any speed."""

import io
from dataclasses import replace

import numpy as np
import pytest
import tiny

from unified_mm.config import Config
from unified_mm.data.records import Record, Stored
from unified_mm.evaluation.evaluate import Scores, over_windows
from unified_mm.inference.loaded import LoadedModel, one_device_mesh
from unified_mm.inference.predictor import mean_directions
from unified_mm.modalities.audio import READ_WINDOWS, _equalised
from unified_mm.search.index_writer import write_index
from unified_mm.search.items import read_items
from unified_mm.search.search_index import SearchIndex
from unified_mm.task import build_task

soundfile = pytest.importorskip("soundfile")

SOUND = {"type": "audio", "seconds": 0.2, "mels": 8, "patch": (5, 4), "mean": -0.1, "std": 0.5}


@pytest.fixture(scope="module")
def model():
    config = tiny.config_dict(
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
        objectives__contrastive__between="audio",
    )
    config.model.modalities = {"audio": SOUND, "text": config.model.modalities.text}
    fields = Config(config.to_dict())
    task = build_task(fields, tiny.tokenizer())
    return LoadedModel(task, tiny.params(task), one_device_mesh(), fields, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound of one window, of three, and of more than are held."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 0.15), ("b", 0.5), ("c", 0.2 * READ_WINDOWS + 1.0)):
        wave = rng.normal(size=round(16_000 * seconds))
        wave *= np.linspace(0, 0.2, len(wave))  # no two windows are alike
        soundfile.write(folder / f"{name}.wav", wave, 16_000)
    return folder


def test_a_long_sound_is_embedded_as_evaluation_does(model, folder):
    audio = model.task.modalities["audio"]
    files = [str(folder / f"{name}.wav") for name in "ab"]
    parts = [audio.windows(file) for file in files]
    assert [len(each) for each in parts] == [1, 3]
    found = model.embed(files, of="audio")
    for vector, each in zip(found, parts, strict=True):
        rows = [audio.prepare(Record(0, {"audio": part}, (), True), None) for part in each]
        mean = model.embed_rows([[{"audio": row}] for row in rows], "audio").mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    contents = [(folder / f"{name}.wav").read_bytes() for name in "ab"]
    np.testing.assert_allclose(model.embed(contents, of="audio"), found[:2], atol=1e-6)
    records = [Record(number, {"audio": file}, (), True) for number, file in enumerate(files)]

    def embed(batch):
        return model.predictor.embed(batch, "audio")

    scores = Scores()
    heard = over_windows(model.predictor, records, "audio", 4, embed, scores, mean_directions)
    np.testing.assert_allclose(found, heard, atol=1e-5)
    beginning = model.embed_rows([[model.read(contents[0], "audio")]], "audio")
    np.testing.assert_allclose(beginning[0], found[0], atol=1e-6)
    with pytest.warns(UserWarning, match=r"b.wav' is longer .*seconds=0.2.* left out"):
        beginning = model.embed_rows([[model.read(folder / "b.wav", "audio")]], "audio")
    assert np.abs(beginning[0] - found[1]).max() > 1e-4


def test_an_index_says_how_many_windows_it_heard(model, folder, tmp_path):
    said = []
    items = read_items(folder, of="audio", suffixes=model.task.modalities["audio"].suffixes)
    write_index(model, items, tmp_path / "index", said.append)
    assert (
        f"2 of 3 audios are longer than the model hears: of these, {3 + READ_WINDOWS} windows, "
        f"evenly spread and at most {READ_WINDOWS} of each, were heard and averaged"
    ) in said
    vectors = SearchIndex.open(tmp_path / "index").nearest["audio"].vectors
    files = [folder / f"{name}.wav" for name in "abc"]
    np.testing.assert_allclose(vectors, model.embed(files, of="audio"), atol=1e-5)


def test_a_damaged_end_is_named(model):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).normal(size=16_000) / 9, 16_000, format="FLAC")
    with pytest.raises(ValueError, match="damaged|cut short"):
        model.embed([out.getvalue()[:20_000]], of="audio")


class Counting:
    """A store of one file that counts how often it is read."""

    def __init__(self, content):
        self.content, self.times = content, 0

    def __getitem__(self, number):
        self.times += 1
        return self.content


@pytest.mark.parametrize("longer", ["crop", "leave_out"])
def test_a_stored_sound_is_read_once(model, longer):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(0).normal(size=3000) / 9, 16_000, format="WAV")
    shelf = Counting(out.getvalue())
    stored = Stored(shelf, 0, "a.wav", len(shelf.content))
    audio = replace(model.task.modalities["audio"], longer=longer)
    record = Record(0, {"audio": stored}, (), True)
    for times, rng in enumerate((None, np.random.default_rng(0)), 1):
        assert audio.prepare(record, rng)["length"] == 3000
        assert shelf.times == times


def test_speed_makes_a_sound_longer_or_shorter_and_loses_none_of_it(model, folder):
    audio = replace(model.task.modalities["audio"], speed=1.25)
    rng = np.random.default_rng(0)
    tone = np.sin(2 * np.pi * 1000 * np.arange(1600) / 16_000) * 8000
    for samples, most in ((1600, 2000), (3000, 3200)):
        wave = np.resize(tone, samples).astype(np.int16)
        drawn = [audio._played(wave, rng) for _ in range(60)]
        lengths = [len(each) for each in drawn]
        assert 0.8 * samples - 1 <= min(lengths) < 0.82 * samples
        assert 0.97 * most < max(lengths) <= most
        for each in drawn[:5]:  # a tone is as much higher as it is shorter
            peak = np.abs(np.fft.rfft(each)).argmax() * 16_000 / len(each)
            assert peak == pytest.approx(1000 * samples / len(each), abs=16)
    assert len(audio._played(np.resize(tone, 1600).astype(np.int16), rng)) != 1600


@pytest.mark.parametrize("decibels", [3.0, 12.0])
def test_equalising_makes_each_frequency_louder_or_softer_as_far_as_asked(decibels):
    rng = np.random.default_rng(0)
    wave = np.rint(rng.normal(size=16_000) * 500).astype(np.int16)
    curves = []
    for _ in range(5):
        found = _equalised(wave, decibels, rng)
        assert found.dtype == np.int16 and found.shape == wave.shape
        powers = (np.abs(np.fft.rfft(each)) ** 2 for each in (wave, found))
        before, after = (each[1:].reshape(-1, 80).sum(1) for each in powers)
        curves.append(10 * np.log10(after / before))  # of 80 Hz each
    assert decibels / 2 < np.abs(curves).max() < decibels + 0.1
    assert np.abs(np.diff(curves)[:, 10:]).max() < decibels / 4  # a line, no noise
    assert np.ptp(curves, axis=0).max() > decibels / 2  # another each time
    full = (np.sign(rng.normal(size=800)) * 32767).astype(np.int16)
    assert np.abs(_equalised(full, 12.0, rng).astype(int)).max() <= 32767
