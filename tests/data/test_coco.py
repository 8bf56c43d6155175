"""The COCO reader: layouts found on disk, faults named with file and place."""

import json

import pytest

from unified_mm.data import coco
from unified_mm.data.manifest import build_manifest
from unified_mm.data.records import Text


def write(folder, captions, images=("a.jpg",), name="captions_train.json", where="images", **info):
    """A data folder; `captions` are (image id, text), ids count the images from 1."""
    listed = [{"id": i + 1, "file_name": file} for i, file in enumerate(images)]
    annotations = [
        {"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(captions)
    ]
    write_json(folder, name, {"info": info, "images": listed, "annotations": annotations})
    (folder / where).mkdir(parents=True, exist_ok=True)
    for file in filter(None, images):
        (folder / where / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / where / file).touch()


def write_json(folder, name, data):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "annotations" / name).write_text(text, encoding="utf-8")


def kinds(captions):
    return [(p.file, p.what, p.action) for p in captions.problems]


@pytest.mark.parametrize("where", ["train2017", "images", "images/train2017"])
def test_images_are_found_in_every_layout(tmp_path, where):
    write(tmp_path, [(1, "a cat")], name="captions_train2017.json", where=where)
    (tmp_path / "images").mkdir(exist_ok=True)
    captions = coco.read_captions(tmp_path, "train")
    assert captions.entries[0].image == tmp_path / where / "a.jpg"
    assert captions.entries[0].captions == ("a cat",)


def test_file_name_may_hold_a_subfolder(tmp_path):
    write(tmp_path, [(1, "a cat")], images=["part/a.jpg"])
    (tmp_path / "images" / "train").mkdir()
    assert coco.read_captions(tmp_path, "train").entries[0].image.is_file()


def test_splits_are_found_and_named_without_year(tmp_path):
    for name in ("train2017", "val2017", "test_composition", "2017"):
        write_json(tmp_path, f"captions_{name}.json", {})
    write_json(tmp_path, "instances_val2017.json", {})
    assert sorted(coco.find_splits(tmp_path)) == ["2017", "test_composition", "train", "val"]


def test_two_years_of_a_split_keep_their_years(tmp_path):
    for name in ("train2014", "train2017", "val2017"):
        write_json(tmp_path, f"captions_{name}.json", {})
    assert sorted(coco.find_splits(tmp_path)) == ["train2014", "train2017", "val"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*data\.dir"):
        coco.find_splits(tmp_path / "nowhere")


def test_folder_without_annotations_says_what_is_there(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no annotations/captions_\*.*there is pictures/"):
        coco.find_splits(tmp_path)


def test_unknown_split_lists_the_known_ones(tmp_path):
    write(tmp_path, [(1, "a cat")])
    write_json(tmp_path, "captions_val.json", {})
    with pytest.raises(ValueError, match=r"no split 'test'.*found the splits train, val"):
        coco.read_captions(tmp_path, "test")


def test_missing_image_folder_says_what_was_looked_for(tmp_path):
    write(tmp_path, [(1, "a cat")], where="photos", name="captions_train2017.json")
    assert coco.read_captions(tmp_path, "train").entries[0].image == tmp_path / "photos" / "a.jpg"
    (tmp_path / "photos" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"looked for train2017/ and images/.*photos/"):
        coco.read_captions(tmp_path, "train")


def test_bad_json_is_named_with_line_and_column(tmp_path):
    write_json(tmp_path, "captions_train.json", '{"images": [],\n "annotations": [}')
    with pytest.raises(ValueError, match=r"captions_train\.json: not JSON at line 2, column 18"):
        coco.read_captions(tmp_path, "train")


def test_bad_utf8_is_named_with_byte(tmp_path):
    write(tmp_path, [(1, "x")])
    path = tmp_path / "annotations" / "captions_train.json"
    path.write_bytes(path.read_bytes()[:7] + b"\xff")
    with pytest.raises(ValueError, match=r"captions_train\.json: not UTF-8 at byte 7"):
        coco.read_captions(tmp_path, "train")


def test_utf_16_depth_and_digits_are_said(tmp_path):
    write(tmp_path, [(1, "x")])
    path = tmp_path / "annotations" / "captions_train.json"
    for content, message in (
        (path.read_text().encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"[" * 10**6, "is nested too deeply"),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "a number of too many digits"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"captions_train\.json: .*{message}"):
            coco.read_captions(tmp_path, "train")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"captions_train\.json: Is a directory"):
        coco.read_captions(tmp_path, "train")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../outside.jpg", "a/../../../outside.jpg", "../.."]
)
def test_file_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": name}]
    write_json(tmp_path, "captions_train.json", {"images": images, "annotations": []})
    message = r"captions_train\.json: images\[1\]\.file_name leads out of the data folder"
    with pytest.raises(ValueError, match=message):
        coco.read_captions(tmp_path, "train")


def test_file_names_that_can_be_no_file_are_missing_images(tmp_path):
    images = [{"id": i, "file_name": name} for i, name in enumerate(("x" * 300, "a\0b", "a/.."))]
    (tmp_path / "images").mkdir()
    write_json(tmp_path, "captions_train.json", {"images": images, "annotations": []})
    assert len(coco.read_captions(tmp_path, "train").entries) == 3


def test_ids_written_as_strings_and_as_numbers_are_pointed_out(tmp_path):
    write(tmp_path, [("1", "a cat"), (7, "of no image")])
    captions = coco.read_captions(tmp_path, "train")
    assert len(captions.caption_problems) == 2
    assert "The id 1 of images is written '1' here, a string" in captions.hint
    assert coco.id_hint(["1", "2"], [2]).startswith(". The id '2' of images is written 2 here")
    assert coco.id_hint([1, 2], [2, 3]) == ""


GOOD = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], r"the file must be an object, is \[\]"),
        ({"images": []}, r"annotations is missing"),
        ({**GOOD, "images": {}}, r"images must be a list, is \{\}"),
        ({**GOOD, "images": [3]}, r"images\[0\] must be an object, is 3"),
        ({**GOOD, "images": [{"file_name": "a"}]}, r"images\[0\]\.id is missing"),
        ({**GOOD, "images": [{"id": True}]}, r"images\[0\]\.id must be a whole number"),
        ({**GOOD, "images": [{"id": 1, "file_name": 5}]}, r"images\[0\]\.file_name must be a str"),
        (
            {**GOOD, "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1}]},
            r"annotations\[1\]\.caption is missing",
        ),
        ({"images": [], "annotations": []}, r"images is empty: the file lists no image"),
    ],
)
def test_wrong_types_are_named_with_their_json_path(tmp_path, change, message):
    write_json(tmp_path, "captions_train.json", change)
    with pytest.raises(ValueError, match=r"captions_train\.json: " + message):
        coco.read_captions(tmp_path, "train")


def test_examples_may_lack_image_or_text(tmp_path):
    write(tmp_path, [(2, "only text")], images=["a.jpg", None, ""])
    first, second, third = coco.read_captions(tmp_path, "train").entries
    assert (first.file, first.captions) == ("a.jpg", ())
    assert (second.file, second.image, second.captions) == (None, None, ("only text",))
    assert (third.file, third.image) == (None, None)


def test_captions_in_any_script_keep_their_order(tmp_path):
    texts = ["a cat", "кошка", "고양이", "猫が寝ている", "قطة", "🐈‍⬛"]
    write(tmp_path, [(1, text) for text in texts])
    captions = coco.read_captions(tmp_path, "train")
    assert captions.entries[0].captions == tuple(texts)
    assert not captions.problems


def test_faulty_captions_are_left_out_and_named(tmp_path):
    write(tmp_path, [(1, "a cat"), (1, ""), (1, " \n\t"), (9, "whose?")])
    captions = coco.read_captions(tmp_path, "train")
    assert captions.entries[0].captions == ("a cat",)
    assert kinds(captions) == [
        ("captions_train.json: annotations[1]", "empty caption", "left out"),
        ("captions_train.json: annotations[2]", "empty caption", "left out"),
        (
            "captions_train.json: annotations[3]",
            "caption of an image that is not listed",
            "left out",
        ),
    ]


def test_repeated_ids_are_merged_kept_or_left_out(tmp_path):
    data = {
        "images": [
            {"id": 1, "file_name": "a.jpg"},
            {"id": 1, "file_name": "a.jpg"},
            {"id": 2, "file_name": "a.jpg"},
            {"id": 2, "file_name": "b.jpg"},
        ],
        "annotations": [
            {"id": 5, "image_id": 1, "caption": "one"},
            {"id": 5, "image_id": 1, "caption": "one"},
            {"id": 5, "image_id": 1, "caption": "another"},
            {"id": 6, "image_id": 2, "caption": "of which file?"},
        ],
    }
    write(tmp_path, [])
    write_json(tmp_path, "captions_train.json", data)
    captions = coco.read_captions(tmp_path, "train")
    assert [(e.id, e.captions) for e in captions.entries] == [(1, ("one", "another"))]
    assert captions.listed == {1, 2} and captions.annotations == 4
    assert [(p.what, p.action) for p in captions.problems] == [
        ("image listed twice", "converted"),
        ("file of another image id too", "converted"),
        ("image id with two different files", "left out"),
        ("annotation listed twice", "left out"),
        ("annotation id of another annotation", "converted"),
    ]


@pytest.mark.parametrize("directional", [True, False])
def test_directional_info_is_read(tmp_path, directional):
    write(tmp_path, [(1, "a cat")], directional=directional)
    assert coco.read_captions(tmp_path, "train").directional is directional


def vqa(answer="red", **changes):
    ten = [{"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in [answer] * 9 + ["no"]]
    question = {"question_id": 7, "image_id": 1, "question": "What colour is it?"}
    answers = {
        "question_id": 7,
        "image_id": 1,
        "question_type": "what colour",
        "answer_type": "other",
        "multiple_choice_answer": answer,
        "answers": ten,
        **changes,
    }
    return {"questions": [question]}, {"annotations": [answers]}


@pytest.mark.parametrize("suffix", ["train2017", "train"])
def test_questions_are_read_in_the_layout_of_vqa(tmp_path, suffix):
    write(tmp_path, [], name="captions_train2017.json")
    assert not coco.has_questions(tmp_path, "train")
    questions, answers = vqa()
    write_json(tmp_path, f"questions_{suffix}.json", questions)
    write_json(tmp_path, f"answers_{suffix}.json", answers)
    assert coco.has_questions(tmp_path, "train")
    (question,) = coco.read_questions(tmp_path, "train")
    assert question.text == Text("What colour is it?", "red")
    assert (question.id, question.image_id) == (7, 1)
    assert question.answers == ("red",) * 9 + ("no",)
    assert (question.answer_type, question.question_type) == ("other", "what colour")


def write_vqa(folder, name, question="What colour is it?"):
    """A pair under VQA v2's own names, whose question says which file it is from."""
    questions, answers = vqa()
    questions["questions"][0]["question"] = question
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"v2_OpenEnded_mscoco_{name}_questions.json").write_text(json.dumps(questions))
    (folder / f"v2_mscoco_{name}_annotations.json").write_text(json.dumps(answers))


def asked(folder, split="train"):
    return [question.question for question in coco.read_questions(folder, split)]


@pytest.mark.parametrize("captions", ["train2014", "train2017", "train"])
@pytest.mark.parametrize("where", [".", "annotations"])
def test_questions_under_the_names_of_vqa_serve_every_year(tmp_path, captions, where):
    write(tmp_path, [], name=f"captions_{captions}.json")
    write_vqa(tmp_path / where, "val2014")
    assert not coco.has_questions(tmp_path, "train")
    write_vqa(tmp_path / where, "train2014")
    assert coco.has_questions(tmp_path, "train")
    (question,) = coco.read_questions(tmp_path, "train")
    assert question.text == Text("What colour is it?", "red")
    assert (question.answer_type, question.question_type) == ("other", "what colour")


def test_the_order_in_which_questions_are_looked_for(tmp_path):
    """Each pair is preferred to those written before it."""
    annotations = tmp_path / "annotations"
    write(tmp_path, [], name="captions_train2017.json")
    places = [
        (tmp_path, "train2015"),
        (annotations, "train2015"),
        (tmp_path, "train2014"),
        (annotations, "train2014"),
        (tmp_path, "train2017"),
        (annotations, "train2017"),
    ]
    for number, (place, name) in enumerate(places):
        write_vqa(place, name, f"pair {number}")
        assert asked(tmp_path) == [f"pair {number}"]
    questions, answers = vqa()
    write_json(tmp_path, "questions_train.json", questions)
    assert asked(tmp_path) == ["pair 5"]  # ours are no whole pair yet
    write_json(tmp_path, "answers_train.json", answers)
    assert asked(tmp_path) == ["What colour is it?"]


def test_two_years_of_captions_each_read_the_questions_of_their_year(tmp_path):
    for year in (2014, 2017):
        write(tmp_path, [], name=f"captions_train{year}.json")
        write_vqa(tmp_path, f"train{year}", f"year {year}")
    assert asked(tmp_path, "train2014") == ["year 2014"]
    assert asked(tmp_path, "train2017") == ["year 2017"]


def test_half_a_pair_and_other_splits_are_no_questions(tmp_path):
    write(tmp_path, [], name="captions_test2015.json")
    write_vqa(tmp_path, "test2015")
    (tmp_path / "v2_mscoco_test2015_annotations.json").unlink()
    write_vqa(tmp_path, "test-dev2015")
    assert not coco.has_questions(tmp_path, "test")
    message = r"no questions with answers for the split 'test': looked for .*questions_test\.json"
    with pytest.raises(FileNotFoundError, match=message):
        coco.read_questions(tmp_path, "test")


def test_question_without_answer_is_an_error(tmp_path):
    write(tmp_path, [])
    questions, answers = vqa(question_id=8)
    write_json(tmp_path, "questions_train.json", questions)
    write_json(tmp_path, "answers_train.json", answers)
    with pytest.raises(ValueError, match=r"questions_train\.json: questions\[0\].*has no answer"):
        coco.read_questions(tmp_path, "train")


@pytest.mark.parametrize(
    ("question", "changes", "message"),
    [
        (" ", {}, r"questions_train\.json: questions\[0\]\.question is empty"),
        (
            "what?",
            {"multiple_choice_answer": ""},
            r"answers_train\.json: annotations\[0\]\.multiple_choice_answer is empty",
        ),
        ("what?", {"answers": []}, r"answers_train\.json: annotations\[0\]\.answers is empty"),
    ],
)
def test_empty_questions_and_answers_are_named(tmp_path, question, changes, message):
    write(tmp_path, [])
    questions, answers = vqa(**changes)
    questions["questions"][0]["question"] = question
    write_json(tmp_path, "questions_train.json", questions)
    write_json(tmp_path, "answers_train.json", answers)
    with pytest.raises(ValueError, match=message):
        coco.read_questions(tmp_path, "train")


def test_malformed_answer_is_named_with_its_place(tmp_path):
    write(tmp_path, [])
    questions, answers = vqa(answers=[{"answer": "red"}, {}])
    write_json(tmp_path, "questions_train.json", questions)
    write_json(tmp_path, "answers_train.json", answers)
    message = r"answers_train\.json: annotations\[0\]\.answers\[1\]\.answer is missing"
    with pytest.raises(ValueError, match=message):
        coco.read_questions(tmp_path, "train")


def test_foils_are_read(tmp_path):
    write(tmp_path, [])
    assert not coco.has_foils(tmp_path, "train")
    foil = {"image_id": 1, "caption": "a red ball", "foil": "a blue ball", "kind": "colour"}
    write_json(tmp_path, "foils_train.json", [foil])
    assert coco.has_foils(tmp_path, "train")
    assert coco.read_foils(tmp_path, "train") == (coco.Foil(**foil),)
    write_json(tmp_path, "foils_train.json", [foil, {**foil, "foil": None}])
    with pytest.raises(ValueError, match=r"foils_train\.json: \[1\]\.foil must be a string"):
        coco.read_foils(tmp_path, "train")


def test_all_captions_that_are_no_text_are_named_at_once(tmp_path):
    (tmp_path / "images").mkdir()
    said = ["good", ["x"], 3, "\ud800", None, " "]
    annotations = [{"image_id": 1, "caption": each} for each in said]
    write_json(tmp_path, "captions_train.json", {**GOOD, "annotations": annotations})
    found = coco.read_captions(tmp_path, "train")
    assert found.entries[0].captions == ("good",) and found.annotations == 6
    assert [(problem.file[-2], problem.what) for problem in found.caption_problems] == [
        ("1", "caption that is no text"),
        ("2", "caption that is no text"),
        ("3", "caption with half of a surrogate pair"),
        ("4", "caption that is no text"),
        ("5", "empty caption"),
    ]


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("images/a.jpg", "images/a.jpg"),
        ("train2017/a.jpg", "train2017/a.jpg"),
        ("photos/deep/a.jpg", "photos/deep/a.jpg"),
        ("sub\\a.jpg", "images/sub/a.jpg"),
        ("val2014/a.jpg", "images/a.jpg"),
        ("caf\u00e9.jpg", "images/cafe\u0301.jpg"),
        ("{folder}/images/a.jpg", "images/a.jpg"),
    ],
)
def test_names_as_people_write_them_are_found(tmp_path, name, there):
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / there).touch()
    images = [{"id": 1, "file_name": name.format(folder=tmp_path)}]
    write_json(tmp_path, "captions_train.json", {"images": images, "annotations": []})
    assert coco.read_captions(tmp_path, "train").entries[0].image == tmp_path / there


def test_a_name_that_two_files_could_have_is_missing_and_says_where_it_was_looked_for(tmp_path):
    for where in ("images/one", "images/two"):
        (tmp_path / where).mkdir(parents=True)
        (tmp_path / where / "a.jpg").touch()
    write_json(tmp_path, "captions_train.json", GOOD)
    listed = coco.read_captions(tmp_path, "train")
    assert listed.entries[0].image == tmp_path / "images" / "a.jpg"
    with pytest.raises(
        ValueError, match=r"missing image.*looked for them below .*images/.*ends of"
    ):
        build_manifest(listed, tmp_path, "train", progress=False)
