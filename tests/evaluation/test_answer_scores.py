"""VQA accuracy: hand-worked answers, and the leave-one-out mean against a written-out oracle."""

import itertools

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from unified_mm.data import coco
from unified_mm.data.manifest import build_manifest, with_questions
from unified_mm.evaluation.answers import (
    answer_accuracy,
    answer_scores,
    normalize_answer,
    question_prior,
)
from unified_mm.evaluation.evaluate import Scores, Split, score_answers
from unified_mm.inference.loaded import one_device_mesh
from unified_mm.inference.predictor import Predictor


def asked_of(text, answers, kind, answer_type=""):
    """A question about some image."""
    return coco.Question(0, 0, text, answers[0] if answers else "", answers, answer_type, kind)


def typed(answers, types, answer_types=None):
    """Questions of these types, in order, that have these answers."""
    rows = zip(answers, types, answer_types or [""] * len(types), strict=True)
    return [asked_of("", tuple(given), kind, of_answer) for given, kind, of_answer in rows]


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Yes.", "yes"),
        ("  The red CUBE! ", "red cube"),
        ("two", "2"),
        ("None", "0"),
        ("twenty", "twenty"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("10:30", "10:30"),
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("isnt", "isn't"),
        ("Isn\u2019t", "isn't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("I'm", "i'm"),
        ("im", "im"),
        ("ive", "ive"),
        ("shes", "shes"),
        ("mustntve", "mustntve"),
        ("somethings", "somethings"),
        ("somebody'd", "somebodyd"),
        ("twas", "'twas"),
        ("yall'll", "y'all'll"),
        ("'ow'sat", "'ow's'at"),
        ("a-b - c", "ab c"),
        ("1,000 red-white", "1000 redwhite"),
        ("its", "its"),
        ("man's", "man's"),
        ("a\nb\tthe", "b"),
        ("the", "the"),
        (" A ", "a"),
        ("?", "?"),
        (" ", ""),
    ],
)
def test_normalization(answer, normalized):
    assert normalize_answer(answer) == normalized


@given(st.text(max_size=40))
def test_normalized_text_is_plain(text):
    once = normalize_answer(text)
    assert once == " ".join(once.split())
    assert once == once.lower()
    assert once == " ".join(text.lower().split()) or not {"a", "an", "the"} & set(once.split())


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # With m of ten agreeing: (m * min((m - 1) / 3, 1) + (10 - m) * min(m / 3, 1)) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_ten_people(agreeing, accuracy):
    answers = ["Red."] * agreeing + ["blue"] * (10 - agreeing)
    assert answer_accuracy("the red", answers) == pytest.approx(accuracy)


@given(st.lists(st.sampled_from("xyz"), min_size=10, max_size=10), st.sampled_from("xyz"))
def test_ten_people_is_the_mean_over_subsets_of_nine(answers, prediction):
    nines = itertools.combinations(answers, 9)
    by_hand = sum(min(nine.count(prediction) / 3, 1) for nine in nines) / 10
    assert answer_accuracy(prediction, answers) == pytest.approx(by_hand)


def test_few_people():
    assert answer_accuracy("2", ["two"]) == 1.0
    assert answer_accuracy("2", ["three"]) == 0.0
    assert answer_accuracy("2", ["2", "2"]) == 1.0
    assert answer_accuracy("2", ["2", "3"]) == 0.5


def test_no_answer_is_right_where_only_an_article_or_a_mark_was_wanted():
    assert answer_accuracy("", ["the"]) == answer_accuracy("", ["?"]) == 0.0
    assert answer_accuracy("The", ["the"]) == answer_accuracy("?", ["?"]) == 1.0


def test_scores_by_type():
    scores = answer_scores(
        ["red", "two", "three", "yes"],
        typed([["red"], ["2"], ["4"], ["no"]], ["colour", "count", "count", "exists"]),
    )
    assert scores == {
        "answer/accuracy": 0.5,
        "answer/accuracy/colour": 1.0,
        "answer/accuracy/count": 0.5,
        "answer/accuracy/exists": 0.0,
    }


def test_scores_by_type_of_answer():
    scores = answer_scores(
        ["red", "two", "three", "yes"],
        typed(
            [["red"], ["2"], ["4"], ["no"]],
            ["what", "how many", "how many", "is"],
            ["other", "number", "number", "yes/no"],
        ),
    )
    assert scores == {
        "answer/accuracy": 0.5,
        "answer/accuracy/how many": 0.5,
        "answer/accuracy/is": 0.0,
        "answer/accuracy/what": 1.0,
        "answer/accuracy/answer_type/number": 0.5,
        "answer/accuracy/answer_type/other": 1.0,
        "answer/accuracy/answer_type/yes/no": 0.0,
    }
    known = answer_scores(["a", "b"], typed([["a"], ["c"]], ["x", "x"], ["other", ""]))
    assert known == {
        "answer/accuracy": 0.5,
        "answer/accuracy/x": 0.5,
        "answer/accuracy/answer_type/other": 1.0,
    }


def test_prior_by_type_of_answer():
    train = [
        asked_of("How many cubes?", ("2",), "count", "number"),
        asked_of("Is there a cube?", ("no",), "exists", "yes/no"),
    ]
    asked = [
        asked_of("How many cubes?", ("2",), "count", "number"),
        asked_of("Is there a cube?", ("yes",), "exists", "yes/no"),
    ]
    prior = question_prior(train, asked)
    assert prior["answer/accuracy/answer_type/number"] == 1.0
    assert prior["answer/accuracy/answer_type/yes/no"] == 0.0


def test_prior_falls_back_from_words_to_type_to_all():
    train = [
        asked_of("How many cubes?", ("two",), "count"),
        asked_of("how many  cubes?", ("2",), "count"),
        asked_of("How many cubes?", ("three",), "count"),
        asked_of("How many balls?", ("five",), "count"),
        asked_of("How many balls?", ("5",), "count"),
        asked_of("How many balls?", ("5",), "count"),
        asked_of("Is there a cube?", ("no",), "exists"),
    ]
    asked = [
        asked_of("How many cubes?", ("2",), "count"),
        asked_of("How many cones?", ("5",), "count"),
        asked_of("Which is left?", ("5",), "side"),
        asked_of("Is there a cube?", ("yes",), "exists"),
    ]
    assert question_prior(train, asked) == {
        "answer/accuracy": 0.75,
        "answer/accuracy/count": 1.0,
        "answer/accuracy/exists": 0.0,
        "answer/accuracy/side": 1.0,
    }


def test_prior_breaks_ties_by_the_alphabet():
    train = [asked_of("Is it?", ("yes",), "is"), asked_of("Is it?", ("no",), "is")]
    assert question_prior(train, [asked_of("Is it?", ("no",), "is")])["answer/accuracy"] == 1.0
    assert question_prior(train[::-1], [asked_of("Is it?", ("no",), "is")])["answer/accuracy"] == 1


def test_errors():
    with pytest.raises(ValueError, match="2 predictions, answers to 1"):
        answer_scores(["a", "b"], typed([["a"]], ["x"]))
    with pytest.raises(ValueError, match="empty"):
        answer_scores([], [])
    with pytest.raises(ValueError, match="question 1 .count. has no answer"):
        answer_scores(["a", "b"], typed([["a"], []], ["count", "count"]))
    with pytest.raises(ValueError, match="without an answer"):
        answer_accuracy("a", [])
    with pytest.raises(ValueError, match="no prior"):
        question_prior([], [asked_of("Is it?", ("no",), "is")])


class SaysRed(Predictor):
    """Answers "red" to every question."""

    def __init__(self):
        super().__init__(tiny.task(), {}, one_device_mesh())

    def write(self, batch, prompts):
        assert len(prompts) == len(batch["image"]["present"])
        return ["red"] * len(prompts)


def on_image(image, answer, answer_type):
    ten = (answer,) * 10
    return coco.Question(image, image, "What is it?", answer, ten, answer_type, "what is")


def test_questions_on_other_images_are_passed_over(tmp_path):
    folder = tiny.write_coco(tmp_path / "coco", train=2, val=2)
    listed = coco.read_captions(folder, "val")
    manifest = build_manifest(listed, folder, "val", progress=False)
    asked = (on_image(0, "red", "other"), on_image(99, "red", "other"), on_image(1, "2", "number"))
    assert [len(r.texts) for r in with_questions(manifest, asked).records] == [3, 3]
    found = Scores()
    score_answers(SaysRed(), Split(manifest, questions=asked, train_questions=asked), found, 8)
    assert found.scores == {
        "answer/accuracy": 0.5,
        "answer/accuracy/what is": 0.5,
        "answer/accuracy/answer_type/number": 0.0,
        "answer/accuracy/answer_type/other": 1.0,
    }
    assert found.chance == found.scores  # the most common training answer is "red" too
    nothing = Scores()
    score_answers(SaysRed(), Split(manifest, questions=asked[1:2]), nothing, 8)
    assert (nothing.scores, nothing.chance) == ({}, {})


def test_questions_of_no_known_type_have_no_score_of_their_type():
    assert answer_scores(["red"], typed([["red"]], [""])) == {"answer/accuracy": 1.0}
