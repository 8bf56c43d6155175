"""Sounds with texts, as people lay them out: each layout is found, and what is broken is named."""

import csv
import json

import numpy as np
import pytest

from unified_mm.data import layouts
from unified_mm.data.manifest import summary
from unified_mm.data.sources import given_folder
from unified_mm.default_config import default_config

soundfile = pytest.importorskip("soundfile")


def sounds(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        wave = 0.3 * np.sin(np.arange(800) * (0.1 + 0.01 * number)).astype("f4")
        soundfile.write(folder / name, wave, 16_000)


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def librispeech(folder):
    sounds(folder, "train-clean-100/1/2/1-2-0000.flac", "train-clean-100/1/2/1-2-0001.flac")
    sounds(folder, "dev-clean/3/4/3-4-0000.flac")
    lines = "1-2-0000 HE HOPED\n1-2-0001 FOR STEW\n1-2-0002 AND LOST\n"
    write(folder, "train-clean-100/1/2/1-2.trans.txt", lines)
    write(folder, "dev-clean/3/4/3-4.trans.txt", "3-4-0000 FOR DINNER\n")
    train = {"1-2-0000": ["HE HOPED"], "1-2-0001": ["FOR STEW"]}
    return {
        "train": train,
        "train-clean-100": train,
        "val": {"3-4-0000": ["FOR DINNER"]},
        "dev-clean": {"3-4-0000": ["FOR DINNER"]},
    }


def test_the_archive_has_a_folder_around_its_splits(tmp_path):
    expected = librispeech(tmp_path / "LibriSpeech")
    found = layouts.librispeech(layouts.Folder(tmp_path))
    assert set(found) == set(expected)


def test_a_folder_that_is_called_train_is_read_once(tmp_path):
    sounds(tmp_path, "train/1/2/1-2-0000.flac")
    write(tmp_path, "train/1/2/1-2.trans.txt", "1-2-0000 HE HOPED\n")
    found = layouts.librispeech(layouts.Folder(tmp_path))
    assert list(found) == ["train"] and found["train"]().annotations == 1


def audiocaps(folder):
    sounds(folder, "audio/abc_30.wav", "audio/-xyz.wav", "audio/9.wav")
    for split, rows in {
        "train": [["1", "abc", "30", "A dog, barking"], ["2", "gone", "0", "Nothing"]],
        "val": [
            ["3", "-xyz", "5", "Rain"],
            ["4", "-xyz", "5", "It rains"],
            ["9", "q", "1", "Wind"],
        ],
    }.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["audiocap_id", "youtube_id", "start_time", "caption"], *rows]
            )
    return {
        "train": {"abc_30": ["A dog, barking"]},
        "val": {"-xyz_5": ["Rain", "It rains"], "q_1": ["Wind"]},
    }


def coco(folder):
    sounds(folder, "audio/a.wav", "audio/b.wav")
    for split, name in (("train", "a"), ("val", "b")):
        content = {
            "audio": [{"id": 1, "file_name": f"{name}.wav"}],
            "annotations": [{"id": 1, "audio_id": 1, "caption": f"sound {name}"}],
        }
        if split == "train":
            content["audio"].append({"id": 2, "file_name": "lost.wav"})
            content["annotations"].append({"id": 2, "audio_id": 7, "caption": "of none"})
        write(folder, f"annotations/captions_{split}.json", json.dumps(content))
    return {"train": {1: ["sound a"]}, "val": {1: ["sound b"]}}


def common_voice(folder):
    sounds(folder, "clips/a.wav", "clips/b.wav")
    head = "client_id\tpath\tsentence\n"
    lines = '1\ta.wav\t"Hello," he said.\n2\tlost.wav\tGone.\n'
    write(folder, "train.tsv", head + lines)
    write(folder, "dev.tsv", f"{head}1\tb.wav\tGood day.\n")
    return {"train": {"a.wav": ['"Hello," he said.']}, "val": {"b.wav": ["Good day."]}}


def audiofolder_csv(folder):
    sounds(folder, "train/a.wav", "val/b.wav")
    head = "file_name,transcription\n"
    write(folder, "train/metadata.csv", f'{head}a.wav,"one, two"\nlost.wav,three\n')
    write(folder, "val/metadata.csv", f"{head}b.wav,four\n")
    return {"train": {"train/a.wav": ["one, two"]}, "val": {"val/b.wav": ["four"]}}


def audiofolder_jsonl(folder):
    sounds(folder, "train/a.wav", "val/b.wav")
    rows = [{"file_name": "a.wav", "text": "one"}, {"file_name": "lost.wav", "text": "two"}]
    write(folder, "train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    write(folder, "val/metadata.jsonl", json.dumps({"file_name": "b.wav", "text": "three"}))
    return {"train": {"train/a.wav": ["one"]}, "val": {"val/b.wav": ["three"]}}


def lines_of_transcripts(folder):
    sounds(folder, "a.wav", "b.wav")
    rows = [
        {"audio": "a.wav", "transcript": "one", "split": "train"},
        {"audio": "lost.wav", "transcript": "two", "split": "train"},
    ]
    write(folder, "train.jsonl", "\n".join(map(json.dumps, rows)))
    write(folder, "val.jsonl", json.dumps({"audio": "b.wav", "transcript": "three"}))
    return {"train": {"a.wav": ["one"]}, "val": {"b.wav": ["three"]}}


LAYOUTS = {
    "librispeech": librispeech,
    "audiocaps": audiocaps,
    "coco": coco,
    "table-common-voice": common_voice,
    "table-audiofolder": audiofolder_csv,
    "imagefolder-audiofolder": audiofolder_jsonl,
    "imagefolder-lines": lines_of_transcripts,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_and_what_is_broken_is_named(layout, tmp_path):
    folder = tmp_path / "data"
    expected = LAYOUTS[layout](folder)
    data = default_config().data
    data.update({"dir": str(folder), "cache_dir": str(tmp_path), "max_bad_share": 0.6})
    source = given_folder(data)
    assert source.name == layout.partition("-")[0]
    found = {split: source.manifest(split) for split in source.splits()}
    assert {
        split: {r.id: [text.target for text in r.texts] for r in each.records if r.parts}
        for split, each in found.items()
    } == expected
    for each in found.values():
        for record in each.records:
            assert record.has("audio") and soundfile.info(record.parts["audio"]).frames == 800
    told = " ".join(problem.file for problem in found["train"].problems)
    assert any(name in told for name in ("lost", "gone", "1-2-0002")), summary(found["train"])
    data.max_bad_share = 0.05
    with pytest.raises(ValueError, match="are bad"):
        given_folder(data).manifest("train")
