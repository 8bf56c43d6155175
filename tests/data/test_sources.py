"""Where examples come from: what is asked for and is not there is said."""

import json

import pytest
import tiny

from unified_mm.config import Config
from unified_mm.data.sources import open_source, refuse_no_questions


def options(folder, **changes):
    fields = tiny.config_dict().data.to_dict() | {"dir": str(folder), "cache_dir": ""} | changes
    return Config(fields)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    return tiny.write_coco(tmp_path / "coco", train=4, val=2)


def write_questions(folder, *images, name="train"):
    questions = [{"question_id": i, "image_id": n, "question": "?"} for i, n in enumerate(images)]
    answers = [
        {
            "question_id": i,
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes"}],
            "answer_type": "",
            "question_type": "",
        }
        for i in range(len(images))
    ]
    for kind, content in (
        ("questions", {"questions": questions}),
        ("answers", {"annotations": answers}),
    ):
        (folder / "annotations" / f"{kind}_{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("source", ["os:getcwd", "os:sep", "builtins:repr"])
def test_what_is_no_source_is_refused(folder, source):
    with pytest.raises(ValueError, match=f"data.source='{source}' (cannot be called|gives a str)"):
        open_source(options(folder, source=source))


def test_a_home_of_nobody_is_named():
    with pytest.raises(ValueError, match=r"data\.dir: '~nobody-here/x' names no user"):
        open_source(options("~nobody-here/x"))


def test_where_questions_were_looked_for_is_said(folder):
    source = open_source(options(folder, question_share=0.5))
    assert [len(record.texts) for record in source.manifest("train").records] == [2, 2, 2, 2]
    message = "data.x asks for questions: .*looked for .*questions_train.json"
    with pytest.raises(ValueError, match=message):
        refuse_no_questions(source, "train", "data.x")
    write_questions(folder, 0, 1)
    assert [len(record.texts) for record in source.manifest("train").records] == [3, 3, 2, 2]


def test_questions_and_foils_on_no_image_are_counted_with_the_manifest(folder):
    write_questions(folder, 0, 9)
    foils = [{"image_id": n, "caption": "a", "foil": "b", "kind": "k"} for n in (0, 8)]
    (folder / "annotations" / "foils_train.json").write_text(json.dumps(foils))
    source = open_source(options(folder, question_share=0.5, max_bad_share=0.5))
    named = [(p.file, p.what) for p in source.manifest("train").problems]
    assert named == [
        ("foil 1", "foil on an image that is not listed"),
        ("question 1", "question on an image that is not listed"),
    ]
    with pytest.raises(ValueError, match="1 of the 2 foils"):
        open_source(options(folder)).manifest("train")


def test_files_of_vqa_may_hold_questions_on_images_of_other_years(folder):
    write_questions(folder, 0, 7, 8, 9)
    annotations = folder / "annotations"
    for ours, theirs in (
        ("questions_train", "v2_OpenEnded_mscoco_train_questions"),
        ("answers_train", "v2_mscoco_train_annotations"),
    ):
        (annotations / f"{ours}.json").rename(annotations / f"{theirs}.json")
    manifest = open_source(options(folder, question_share=0.5)).manifest("train")
    assert len(manifest.problems) == 3
