"""Caption scores: parity with pycocoevalcap, hand-worked values, and the tokenizer's words."""

import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from unified_mm.evaluation import caption_scores as scores

WORDS = "a red cube is left of the big shiny ball and behind it".split()


def reference_scores(candidates, references):
    """The same corpus through pycocoevalcap's scorers."""
    generated = {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)}
    given = {i: [" ".join(tokens) for tokens in texts] for i, texts in enumerate(references)}
    cider, per_image = Cider().compute_score(given, generated)
    bleu, _ = Bleu(4).compute_score(given, generated, verbose=0)
    rouge, _ = Rouge().compute_score(given, generated)
    return cider, per_image, bleu, rouge


def assert_parity(candidates, references):
    cider, per_image, bleu, rouge = reference_scores(candidates, references)
    assert scores.cider_d(candidates, references) == pytest.approx(cider, abs=1e-6)
    np.testing.assert_allclose(
        scores.cider_d_per_image(candidates, references), per_image, atol=1e-6, rtol=0
    )
    assert scores.bleu(candidates, references) == pytest.approx(bleu, abs=1e-6)
    assert scores.rouge_l(candidates, references) == pytest.approx(rouge, abs=1e-6)


sentence = st.lists(st.sampled_from(WORDS), max_size=14)
corpus = st.lists(
    st.tuples(sentence, st.lists(sentence, min_size=1, max_size=4)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(corpus)
def test_parity_on_any_corpus(images):
    references = [texts for _, texts in images]
    # pycocoevalcap fails where no reference of the corpus has a word.
    references[0] = [*references[0], ["ball"]]
    assert_parity([candidate for candidate, _ in images], references)


def test_parity_on_a_corpus_of_natural_size():
    """Candidates that are near-copies, so that long n-grams match and are clipped."""
    chance = random.Random(0)
    references = [
        [chance.choices(WORDS, k=chance.randint(5, 20)) for _ in range(5)] for _ in range(200)
    ]
    candidates = [
        [chance.choice(WORDS) if chance.random() < 0.2 else word for word in chance.choice(texts)]
        for texts in references
    ]
    candidates[7], candidates[8], candidates[9] = [], ["a"] * 300, ["unseen"] * 5
    assert_parity(candidates, references)


@pytest.mark.parametrize(
    ("candidates", "references"),
    [
        ([["a", "cube"]], [[["a", "cube"]]]),
        ([[]], [[["a"], ["b"]]]),
        ([["a"], []], [[["a"]], [["b"], []]]),
        ([[], []], [[[]], [["a"]]]),
        ([["a"] * 500, ["b"]], [[["a"] * 3], [["b"] * 400]]),
        ([["a", "b", "c", "d", "e"]] * 3, [[["a", "b", "c", "d", "e"]] * 2] * 3),
    ],
    ids=["one image", "empty", "one word", "empty reference", "very long", "identical"],
)
def test_parity_at_the_edges(candidates, references):
    assert_parity(candidates, references)


def test_perfect_captions_score_full():
    sentences = [["a", "red", "cube", "x"], ["b", "blue", "ball", "y"], ["c", "green", "can", "z"]]
    references = [[tokens] for tokens in sentences]
    assert scores.cider_d(sentences, references) == pytest.approx(10)
    assert scores.bleu(sentences, references) == pytest.approx([1] * 4)
    assert scores.rouge_l(sentences, references) == pytest.approx(1)


def test_cider_d_by_hand():
    """Two images; the shared word weighs nothing, the others log 2, one word is missing."""
    candidates = [["a", "red"], ["a", "dog"]]
    references = [[["a", "red", "cube"]], [["a", "dog"]]]
    # n = 1: (red) against (red, cube) is 1 / sqrt 2; n = 2: (a red) against (a red, red cube).
    first = 10 / 4 * (2 / math.sqrt(2)) * math.exp(-1 / 72)
    # n = 1 and n = 2 are perfect, there is no 3-gram.
    np.testing.assert_allclose(scores.cider_d_per_image(candidates, references), [first, 5.0])


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    candidates = [["a"] * 4]
    references = [[["a"] * 5, ["a"] * 3]]
    assert scores.bleu(candidates, references)[0] == pytest.approx(1.0)


def test_rouge_by_hand():
    # The longest common subsequence is "red of cube": precision 3 / 4, recall 3 / 6.
    value = scores.rouge_l([["red", "of", "a", "cube"]], [["the red left of big cube".split()]])
    assert value == pytest.approx((1 + 1.44) * 0.75 * 0.5 / (0.5 + 1.44 * 0.75))


@given(st.permutations(range(5)))
def test_order_of_images_and_references_does_not_matter(order):
    chance = random.Random(1)
    candidates = [chance.choices(WORDS, k=6) for _ in range(5)]
    references = [[chance.choices(WORDS, k=6) for _ in range(3)] for _ in range(5)]
    moved = [candidates[i] for i in order], [references[i][::-1] for i in order]
    assert scores.cider_d(*moved) == pytest.approx(scores.cider_d(candidates, references))
    assert scores.bleu(*moved) == pytest.approx(scores.bleu(candidates, references))
    assert scores.rouge_l(*moved) == pytest.approx(scores.rouge_l(candidates, references))


def test_names_and_tokenization():
    result = scores.caption_scores(
        ["A red cube, left of a ball.", "Two dogs!"],
        [["a red cube left of a ball"], ["two DOGS", "the dogs"]],
    )
    assert list(result) == ["cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert result["rouge_l"] == pytest.approx(1)
    assert result["bleu_1"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "tokens"),
    # What coco-caption's PTBTokenizer (Stanford CoreNLP 3.4.1) gave for these sentences.
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("I can't, cannot, won't!", "i ca n't can not wo n't"),
        ("it\u2019s a \u2018test\u2019 \u201cok\u201d", "it 's a test ok"),
        ('red/blue t-shirt, "quoted" text!', "red/blue t-shirt quoted text"),
        ("a & b; c: d -- e - f ... g", "a & b c d e f g"),
        ("well-known U.S. Mr. Smith's 10:30 a.m.", "well-known u.s. mr. smith 's 10:30 a.m."),
        ("3.5 1,000 $5 50% #1", "3.5 1,000 $ 5 50 % # 1"),
        ("the dogs' caf\u00e9 is na\u00efve \u2014 en", "the dogs café is naïve en"),
        ("two-year-old's toy; John's.", "two-year-old 's toy john 's"),
        ("couldn't they've let's", "could n't they 've let 's"),
        ("roll, o'clock 1/2 cup", "roll o'clock 1/2 cup"),
        ("12th 20's 1980s top of a 3.5-inch", "12th 20 's 1980s top of a 3.5-inch"),
        ("gonna wanna gotta", "gon na wan na got ta"),
        ("", ""),
    ],
)
def test_tokenizer_words(text, tokens):
    assert scores.tokenize(text) == tokens.split()


def test_brackets_are_dropped():
    assert scores.tokenize("a dog (brown) [big]") == ["a", "dog", "brown", "big"]


@pytest.mark.parametrize("scorer", [scores.cider_d, scores.bleu, scores.rouge_l])
def test_errors(scorer):
    with pytest.raises(ValueError, match="2 candidates but references of 1"):
        scorer([["a"], ["b"]], [[["a"]]])
    with pytest.raises(ValueError, match="empty"):
        scorer([], [])
    with pytest.raises(ValueError, match="1 images have no reference caption .first: index 1"):
        scorer([["a"], ["b"]], [[["a"]], []])


def test_every_process_scores_to_the_last_bit_alike():
    """Python's hashes of text differ from one process to the next, and with them sets' orders."""
    program = """
import random
from unified_mm.evaluation.caption_scores import caption_scores
draw = random.Random(0)
words = [a + b for a in "abcdefgh" for b in "xyzvw"]
references = [[" ".join(draw.choices(words, k=20))] for _ in range(30)]
candidates = [" ".join(sorted(texts[0].split())) for texts in references]
print(caption_scores(candidates, references))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert len(said) == 1


@pytest.mark.parametrize(
    ("right", "nearly", "wrong"),
    [
        (["一只红色的猫在桌子上", "两人走路"], ["一只红色的狗在桌子上", "两人跑步"], "公共汽车"),
        (["赤いカップがある。", "犬が走る。"], ["青いカップがある", "犬が歩く"], "電車です"),
        (["แมวสีแดงบนโต๊ะ", "คนสองคนริมทะเล"], ["หมาสีแดงบนโต๊ะ", "คนสามคนริมทะเล"], "รถ"),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)  # fmt: skip
def test_scripts_without_spaces_are_scored_by_characters(right, nearly, wrong):
    references = [[text] for text in right]
    written = (right, nearly, [wrong] * 2)
    by_text = [scores.caption_scores(texts, references) for texts in written]
    full, close, far = (found["characters/cider_d"] for found in by_text)
    assert full == pytest.approx(10) and full > close > 3 and far < 1
    assert by_text[1]["characters/bleu_1"] > 0.5 and by_text[1]["characters/rouge_l"] > 0.5


def test_a_sentence_without_spaces_is_one_word_to_the_scores_of_words():
    found = scores.caption_scores(["一只狗", "两个人"], [["一只猫"], ["三个人"]])
    assert found["cider_d"] == 0 and found["characters/cider_d"] > 1


def test_scripts_with_spaces_have_the_scores_of_words_alone():
    for references in ([["a red cube"], ["zwei Männer"]], [["красный куб"], ["빨간 컵"]]):
        found = scores.caption_scores(["a red cube", "a"], references)
        assert list(found) == ["cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert scores.without_spaces([["猫 on the 机"], ["一只猫在机"]])
    assert not scores.without_spaces([["a cat called 猫"], []])
