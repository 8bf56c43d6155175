"""VQA v2 accuracy of open-ended answers, and of a baseline that sees the question alone.

See Antol et al. 2015, section 3 (accuracy by consensus of ten people), and Goyal et al. 2017
(VQA v2), with the answer normalisation published beside its evaluation server.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from unified_mm.data.coco import Question

_CONSENSUS = 3  # people who have to have said an answer before it counts fully

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}

# The contractions that the official evaluation knows, by their full spelling. It mends those with
# one apostrophe left out, of several any one, and no others: "im", "ive" and "shes" stay.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()
_FULL_SPELLING = {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in _CONTRACTIONS
    for place, mark in enumerate(contraction)
    if mark == "'"
} | {"somebody'd": "somebodyd"}  # the official one has this line the wrong way round

_CURLY_APOSTROPHES = str.maketrans("\u2018\u2019", "''")
_THOUSANDS_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_answer(answer: str) -> str:
    """Returns an answer in the form in which VQA v2 compares answers.

    It is in lower case; full stops are dropped except before a digit; other punctuation except
    apostrophe and colon becomes spaces, but a mark that stands beside a space anywhere is dropped
    everywhere, and all are where a comma stands between digits; number words up to ten become
    digits ("none" is 0); articles are dropped; apostrophes of contractions are put back; words are
    separated by single spaces. An answer of which nothing would be left, such as "the" or "?", is
    left as it is, so that no empty answer equals it.
    """
    plain = " ".join(answer.lower().translate(_CURLY_APOSTROPHES).split())
    numbers = _THOUSANDS_COMMA.search(plain)
    bare = plain
    for mark in _PUNCTUATION:
        dropped = numbers or f"{mark} " in plain or f" {mark}" in plain
        bare = bare.replace(mark, "" if dropped else " ")
    digits = (_NUMBER_WORDS.get(word, word) for word in _FULL_STOP.sub("", bare).split())
    words = (_FULL_SPELLING.get(word, word) for word in digits if word not in _ARTICLES)
    return " ".join(words) or plain


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns the VQA accuracy of one prediction, in [0, 1].

    It is the mean over the people of `min(m / 3, 1)`, where m of the other people gave the
    predicted answer. With fewer than four answers all the others are needed instead of three; a
    single answer has to match exactly. Both sides are normalized first.

    Raises:
      ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("a question without an answer cannot be scored: leave it out.")
    predicted = normalize_answer(prediction)
    matches = [normalize_answer(answer) == predicted for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    agreeing, needed = sum(matches), min(_CONSENSUS, len(matches) - 1)
    left_out = (min((agreeing - match) / needed, 1.0) for match in matches)
    return sum(left_out) / len(matches)


def answer_scores(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Returns the mean accuracy over all questions and over those of each type, in [0, 1].

    Returns:
      `answer/accuracy` and, in alphabetic order, `answer/accuracy/<type>` for each known type of
      question and `answer/accuracy/answer_type/<type>` for each known type of answer ('' is
      unknown).

    Raises:
      ValueError: there is no question, lengths differ, or a question has no answer.
    """
    if len(predictions) != len(questions):
        raise ValueError(
            f"{len(predictions)} predictions, answers to {len(questions)} questions: give one of "
            "each per question, in the same order."
        )
    if not predictions:
        raise ValueError("no answers to score: the list of questions is empty.")
    every: list[float] = []
    by_type: defaultdict[str, list[float]] = defaultdict(list)
    by_answer: defaultdict[str, list[float]] = defaultdict(list)
    for i, (prediction, question) in enumerate(zip(predictions, questions, strict=True)):
        kind = question.question_type
        if not question.answers:
            raise ValueError(f"question {i} ({kind}) has no answer to compare with: leave it out.")
        every.append(answer_accuracy(prediction, question.answers))
        if kind:
            by_type[kind].append(every[-1])
        if question.answer_type:
            by_answer[question.answer_type].append(every[-1])
    return {
        "answer/accuracy": fmean(every),
        **{f"answer/accuracy/{kind}": fmean(by_type[kind]) for kind in sorted(by_type)},
        **{f"answer/accuracy/answer_type/{k}": fmean(by_answer[k]) for k in sorted(by_answer)},
    }


def question_prior(
    train_questions: Sequence[Question], questions: Sequence[Question]
) -> dict[str, float]:
    """Returns the scores of a baseline that sees the questions but no images.

    It gives each question the most common training answer to the same words, else to questions
    of its type, else to any question; of equally common answers the alphabetically first.

    Returns:
      The scores of `answer_scores`, under the same names.

    Raises:
      ValueError: no training question has an answer, or `answer_scores` refuses the questions.
    """
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_type: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in train_questions:
        answers = [normalize_answer(answer) for answer in question.answers]
        kind = question.question_type
        for count in (by_text[_same_words(question.question)], by_type[kind], overall):
            count.update(answers)
    if not overall:
        raise ValueError("no training question has an answer: there is no prior to measure.")

    def guess(question: Question) -> str:
        same = by_text.get(_same_words(question.question))
        known = same or by_type.get(question.question_type) or overall
        return min(known, key=lambda answer: (-known[answer], answer))

    return answer_scores([guess(question) for question in questions], questions)


def _same_words(text: str) -> str:
    return " ".join(text.lower().split())
