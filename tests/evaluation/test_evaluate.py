"""What a split must hold to be scored, and foils on images that it does not have."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

from unified_mm.data.coco import Foil, Question
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.evaluation.evaluate import (
    Scores,
    Split,
    check_split,
    evaluate,
    score_captions,
    score_foils,
)
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor


@pytest.fixture(scope="module")
def task():
    return tiny.task()


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Records of three images, of which the first has no caption."""
    folder = tiny.write_coco(tmp_path_factory.mktemp("data") / "coco", train=3, val=1)
    texts = [(), (Text("", "red"), Text("what?", "red")), (Text("", "blue"),)]
    paths = [str(folder / "images" / "train" / f"{number}.jpg") for number in range(3)]
    return [
        Record(number, {"image": path}, text, True)
        for number, (path, text) in enumerate(zip(paths, texts, strict=True))
    ]


def split(records, foils=()):
    return Split(Manifest("val", tuple(records), "coco", "/data", "x"), foils)


def test_captions_need_two_images_and_anything_one(task, captioned):
    check_split(split(captioned), task)
    with pytest.raises(ValueError, match="'val' in /data has 1 image with a caption to be scored"):
        check_split(split(captioned[:2]), task)
    contrast = tiny.task(objectives__captioning__weight=0.0, objectives__matching__weight=0.0)
    check_split(split(captioned[:2]), contrast)
    for nothing in (captioned[:1], [Record(1, {}, (Text("", "red"),), True)]):
        with pytest.raises(ValueError, match="no image with a caption: there is nothing to score"):
            check_split(split(nothing), contrast)


class SaysRed(Predictor):
    """Answers "red" to every question."""

    def write(self, batch, prompts):
        return ["red"] * len(prompts)


def test_questions_alone_are_scored_by_their_answers(task, captioned):
    records = [replace(r, texts=(Text("red?", "red"),)) for r in captioned]
    asked = [
        Question(n, n, "red?", said, (said,), "other", "what")
        for n, said in enumerate(["red", "blue", "red"])
    ]
    alone = replace(split(records), questions=asked)
    check_split(alone, task)
    found = evaluate(SaysRed(task, None, one_device_mesh()), alone, batch_size=4)
    assert found.scores["answer/accuracy"] == pytest.approx(2 / 3)
    assert not any(name.startswith(("caption", "text_to", "image_to")) for name in found.scores)
    assert [q.id for q in found.questions] == [0, 1, 2] and found.answers == ["red"] * 3
    contrast = tiny.task(objectives__captioning__weight=0.0, objectives__matching__weight=0.0)
    with pytest.raises(ValueError, match="its 3 questions need objectives.captioning"):
        check_split(alone, contrast)
    with pytest.raises(ValueError, match="nothing to score$"):
        check_split(replace(alone, questions=[replace(asked[0], image_id=9)]), task)


def test_captions_without_spaces_are_scored_by_characters_with_a_warning(task, captioned):
    records = [
        replace(record, texts=(Text("", text),))
        for record, text in zip(captioned, ["红色的方块", "蓝色的方块", "绿色的圆"], strict=True)
    ]
    found = Scores(images=records)

    class Copies(Predictor):
        def write(self, batch, prompts):
            return ["红色的方块", "蓝色的", "绿色", ""][: len(prompts)]

    split = Split(Manifest("val", tuple(records), "coco", "folder", ""))
    score_captions(Copies(task, None, one_device_mesh()), split, found, 4)
    assert found.scores["caption/characters/cider_d"] > found.chance["caption/characters/cider_d"]
    assert "caption/characters/" in found.warnings[0]


def test_a_batch_of_no_row_is_named_by_its_field(task, captioned):
    predictor = Predictor(task, None, one_device_mesh())
    with pytest.raises(ValueError, match="evaluation.batch_size=0: must be at least 1"):
        evaluate(predictor, split(captioned), batch_size=0)


def test_foils_need_an_image_and_no_caption(task, captioned):
    class PrefersLong(Predictor):
        def log_likelihood(self, batch):
            length = np.asarray(batch["text"]["valid"].sum(1), np.float32)
            return np.stack([length, length], axis=1)

    predictor = PrefersLong(task, None, one_device_mesh())
    foils = [
        Foil(0, "a red square", "red", "length"),  # an image without caption
        Foil(1, "red", "a red square", "length"),
        Foil(9, "red", "blue", "no image"),
    ]
    found = Scores()
    score_foils(predictor, split(captioned, foils), found, 4)
    assert found.scores == {"foil/accuracy": 0.5, "foil/accuracy/length": 0.5}
    nothing = Scores()
    score_foils(predictor, split(captioned, foils[2:]), nothing, 4)
    assert nothing.scores == {}
