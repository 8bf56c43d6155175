"""Sounds of any kind become one channel of 16 kHz, and what is none is named."""

import json
import wave

import numpy as np
import pytest

from unified_mm.data import sounds
from unified_mm.data.layouts import LAYOUTS, Folder
from unified_mm.data.manifest import build_manifest, summary
from unified_mm.data.sources import given_folder
from unified_mm.default_config import default_config

soundfile = pytest.importorskip("soundfile")


def tone(seconds=0.25, rate=16_000, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("f4")


def test_samples_of_16_bits_come_as_they_are(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 1000).astype(np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", samples, 16_000, subtype="PCM_16")
        np.testing.assert_array_equal(sounds.decode(tmp_path / f"a.{suffix}"), samples)
        assert sounds.check(tmp_path / f"a.{suffix}") == ""
        part = sounds.decode(tmp_path / f"a.{suffix}", start=100 / 16_000, seconds=50 / 16_000)
        np.testing.assert_array_equal(part, samples[100:150])
    content = (tmp_path / "a.flac").read_bytes()
    np.testing.assert_array_equal(sounds.decode(content), samples)


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("a.wav", 44_100, 2, "PCM_24"),
        ("a.wav", 8_000, 1, "PCM_U8"),
        ("a.flac", 48_000, 1, "PCM_16"),
        ("a.ogg", 16_000, 2, "VORBIS"),
    ],
)
def test_other_kinds_are_converted_and_said(tmp_path, name, rate, channels, subtype):
    heard = np.stack([tone(rate=rate)] * channels, axis=1)
    soundfile.write(tmp_path / name, heard, rate, subtype=subtype)
    found = sounds.decode(tmp_path / name).astype(np.float32) / 32768
    want = tone()
    assert abs(len(found) - len(want)) <= 1
    middle = slice(800, 3200)
    assert np.corrcoef(found[middle], want[middle])[0, 1] > 0.99
    said = sounds.check(tmp_path / name)
    assert ("resampled" in said) == (rate != 16_000) and ("averaged" in said) == (channels > 1)


def bad_files(folder):
    soundfile.write(folder / "cut.flac", tone(1.0), 16_000)
    whole = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "nothing.wav", np.zeros(0, "f4"), 16_000)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.mp3").write_text("no sound")
    soundfile.write(folder / "nan.wav", np.full(100, np.nan, "f4"), 16_000, subtype="FLOAT")
    return {"cut.flac", "nothing.wav", "empty.wav", "text.mp3", "nan.wav"}


def test_bad_files_are_refused(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(sounds.SoundError, match=name):
            sounds.check(tmp_path / name)


def of_length(content, total):
    """A FLAC whose header tells of so many samples, in its 36 bits."""
    at = 4 + 4 + 13  # the mark, the block's own header, what comes before in STREAMINFO
    first = bytes([content[at] & 0xF0 | total >> 32])
    return content[:at] + first + (total & 0xFFFFFFFF).to_bytes(4, "big") + content[at + 5 :]


def test_a_header_that_tells_of_no_length_or_of_years_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(), 16_000)
    whole = (tmp_path / "a.flac").read_bytes()
    assert len(sounds.decode(of_length(whole, 4_000))) == 4_000
    for total in (0, 2**36 - 1):
        rate = whole if total == 0 else of_rate(whole, 10)
        (tmp_path / "b.flac").write_bytes(of_length(rate, total))
        for look in (sounds.check, sounds.seconds_of, sounds.decode):
            with pytest.raises(sounds.SoundError, match="b.flac: its header tells of no length"):
                look(tmp_path / "b.flac")


def of_rate(content, hertz):
    at = 4 + 4 + 10
    return content[:at] + (hertz << 4).to_bytes(3, "big")[:2] + bytes(
        [(hertz << 4) & 0xF0 | content[at + 2] & 0x0F]
    ) + content[at + 3 :]  # fmt: skip


def test_what_is_not_one_sample_long_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(2, "f4") / 2, 96_000)
    for look in (sounds.check, sounds.decode):
        with pytest.raises(sounds.SoundError, match="not one sample at 16,000 Hz"):
            look(tmp_path / "a.wav")


def write_classes(folder, count=6):
    for kind, hertz in (("high_tone", 2000.0), ("low_tone", 200.0)):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            soundfile.write(folder / kind / f"{number}.wav", tone(hertz=hertz + number), 16_000)
    return folder


def manifest_of(folder, cache, **changes):
    data = default_config().data
    data.dir, data.cache_dir = str(folder), str(cache)
    data.update(changes)
    source = given_folder(data)
    return source, {name: source.manifest(name) for name in source.splits()}


def test_folders_of_classes(tmp_path):
    folder = write_classes(tmp_path / "sounds")
    bad_files(folder / "high_tone")
    source, found = manifest_of(folder, tmp_path / "cache", max_bad_share=0.5)
    records = [record for each in found.values() for record in each.records]
    assert source.name == "classes" and len(records) == 12
    record = next(record for record in records if record.id == "high_tone/3.wav")
    assert record.labels == ("high tone",) and record.texts[0].target == "high tone"
    assert record.parts == {"audio": str(folder / "high_tone/3.wav")}
    told = " ".join(map(summary, found.values()))
    for each in ("audios and", "no samples", "not finite", "no sound that can be read"):
        assert each in told
    _, same = manifest_of(folder, tmp_path / "cache", max_bad_share=0.5)
    assert same == found  # of the cache
    with pytest.raises(ValueError, match="val_rows='fold=1' is for the rows of tables"):
        manifest_of(folder, tmp_path / "cache", val_rows="fold=1")


def test_a_changed_sound_or_label_changes_the_fingerprint(tmp_path):
    rows = [["a.wav", "dog", 1], ["b.wav", "cat", 2], ["c.wav", "dog", 1]]

    def written(folder, rows):
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        lines = [",".join(map(str, row)) for row in [["filename", "category", "fold"], *rows]]
        (folder / "meta.csv").write_text("\n".join(lines))
        for number, row in enumerate(rows):
            soundfile.write(folder / "audio" / row[0], tone(hertz=300 + number), 16_000)
        _, found = manifest_of(folder, tmp_path / "cache", val_rows="fold=2")
        return found

    first = written(tmp_path / "one", rows)
    assert [r.id for r in first["train"].records] == ["a.wav", "c.wav"]
    assert first["val"].records[0].labels == ("cat",)
    assert first["val"].records[0].texts[0].target == "cat"
    other = written(tmp_path / "two", [["a.wav", "cat", 1], *rows[1:]])
    assert other["train"].fingerprint != first["train"].fingerprint
    soundfile.write(tmp_path / "one/audio/a.wav", tone(0.5), 16_000)
    _, changed = manifest_of(tmp_path / "one", tmp_path / "cache", val_rows="fold=2")
    assert changed["train"].fingerprint != first["train"].fingerprint
    with pytest.raises(ValueError, match=r"data.val_rows='take=2' must be FIELD=VALUE"):
        manifest_of(tmp_path / "one", tmp_path / "cache", val_rows="take=2")


def test_rows_with_any_of_the_parts(tmp_path):
    (tmp_path / "audio").mkdir()
    for name in ("said", "heard"):
        soundfile.write(tmp_path / f"audio/{name}.ogg", tone(), 16_000)
    lines = [
        {"id": "frog", "text": "A frog.", "speech": "audio/said.ogg", "sound": None},
        {"id": "cow", "text": "A cow.", "speech": None, "sound": "audio/heard.ogg"},
        {"id": "tree", "text": "A tree.", "speech": None, "sound": None},
    ]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = LAYOUTS["imagefolder"][1]
    both = build_manifest(read(Folder(tmp_path, audio="speech,sound"))["all"](), tmp_path, "all")
    assert [sorted(record.parts) for record in both.records] == [["speech"], ["sound"], []]
    one = build_manifest(read(Folder(tmp_path, audio="sound"))["all"](), tmp_path, "all")
    assert [sorted(record.parts) for record in one.records] == [[], ["audio"], []]


def test_a_wave_of_the_standard_library_is_read(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.arange(100, dtype="<i2").tobytes())
    np.testing.assert_array_equal(sounds.decode(tmp_path / "a.wav"), np.arange(100))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    """As an error of what was given, which a command says in a line; no sound counts as bad."""

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ValueError, match=r"soundfile.*unified_mm\[audio\]") as error:
        sounds.check(tmp_path / "any.wav")
    assert not isinstance(error.value, sounds.SoundError)
