"""What is said of scenes, read back by a parser that knows nothing of how it was made."""

import itertools
import re
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.world.language import (
    KINDS,
    UNEVEN,
    Question,
    balanced,
    captions,
    foil,
    holds,
    questions,
)
from unified_mm.world.scenes import (
    ATTRIBUTES,
    HELD_OUT,
    Camera,
    Object,
    Scene,
    WorldSpec,
    sample_scene,
)

SPEC = WorldSpec()
THING = re.compile(r"\ban? ((?:\w+ )*?)(sphere|cube|cylinder)")
CLEARLY_NEARER = 0.2  # world units


@cache
def scene_of(split, index):
    return sample_scene(SPEC, split, index)


@pytest.fixture(scope="module")
def told():
    """(split, scene, its captions) of some scenes of each split."""
    rng = np.random.default_rng(0)
    return [
        (split, scene_of(split, i), captions(scene_of(split, i), rng))
        for split in ("val", "test_composition")
        for i in range(70)
    ]


@pytest.fixture(scope="module")
def foils(told):
    """(scene, caption, foil, kind) in words, of every kind that each caption allows."""
    rng = np.random.default_rng(1)
    made = [
        (scene, caption.text(), wrong.text(), kind)
        for _, scene, said in told[::3]
        for caption in said
        for kind in KINDS
        if (wrong := foil(scene, caption, kind, rng)) is not None
    ]
    assert len(made) > 500
    return made


def parse(text):
    """A caption's things, as words by attribute, and the relation of each to the next."""
    found = list(THING.finditer(text))
    things = []
    for match in found:
        thing = {"shape": match[2]}
        for word in match[1].split():
            [name] = [name for name, words in ATTRIBUTES.items() if word in words]
            thing[name] = word
        things.append(thing)
    between = [text[a.end() : b.start()].strip() for a, b in itertools.pairwise(found)]
    if text.startswith(("from left to right, ", "left to right: ")):
        between = ["left of"] * len(between)
    elif text.startswith("from right to left, "):
        between = ["right of"] * len(between)
    assert set(between) <= {"left of", "right of", "in front of", "behind"}, text
    return things, between


def true_of(text, scene):
    """Whether some choice of different objects is as the caption says, pair by pair."""
    things, relations = parse(text)
    x, _, depth = scene.places().T

    def related(relation, i, j):
        return {
            "left of": x[i] < x[j],
            "right of": x[i] > x[j],
            "in front of": depth[i] < depth[j] - CLEARLY_NEARER,
            "behind": depth[i] > depth[j] + CLEARLY_NEARER,
        }[relation]

    def like(i, thing):
        return all(getattr(scene.objects[i], name) == word for name, word in thing.items())

    return any(
        all(like(i, thing) for i, thing in zip(chosen, things, strict=True))
        and all(related(r, i, j) for r, i, j in zip(relations, chosen, chosen[1:]))
        for chosen in itertools.permutations(range(len(scene.objects)), len(things))
    )


def test_five_different_captions_all_true(told):
    for _, scene, said in told:
        texts = [caption.text() for caption in said]
        assert len(set(texts)) == 5
        assert all(true_of(text, scene) for text in texts), texts
        assert all(holds(caption, scene) for caption in said)


def test_most_captions_name_every_object_by_all_its_words(told):
    whole = full = total = 0
    for _, scene, said in told:
        for caption in said:
            things, _ = parse(caption.text())
            total += 1
            whole += len(things) == len(scene.objects)
            full += all(len(thing) == 4 for thing in things)
    assert whole > 0.85 * total
    assert full > 0.75 * total


def test_wording_is_plain_english(told, foils):
    texts = [caption.text() for _, _, said in told for caption in said]
    for text in texts + [wrong for _, _, wrong, _ in foils]:
        assert text == text.lower().strip() and "  " not in text and " ," not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_captions_fit_the_text_length_of_the_tiny_recipe(told):
    texts = [caption.text() for _, _, said in told for caption in said]
    tokenizer = TextTokenizer.train(texts, 512)
    longest = max(texts, key=lambda text: len(tokenizer.encode_prompt(text)))
    assert len(tokenizer.encode_prompt(longest)) + 1 <= 32, longest


def test_relations_all_occur(told):
    used = Counter(r for _, _, said in told for caption in said for r in parse(caption.text())[1])
    assert set(used) == {"left of", "right of", "in front of", "behind"}
    assert min(used.values()) > 0.01 * used.total()


def test_foils_are_false_and_one_word_away(foils):
    for scene, caption, wrong, kind in foils:
        assert true_of(caption, scene) and not true_of(wrong, scene), (caption, wrong)
        before, after = caption.split(), wrong.split()
        assert len(before) == len(after)
        [(old, new)] = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        words = ATTRIBUTES.get(kind, ("left", "right"))
        assert {old.strip(","), new.strip(",")} <= set(words), kind
    assert set(Counter(kind for *_, kind in foils)) == set(KINDS)


def test_words_alone_do_not_betray_a_foil(told, foils):
    """A foil has no pattern that true captions lack: pairs, mixed sides, things named twice."""

    def pattern(text):
        things, relations = parse(text)
        full = all(len(thing) == 4 for thing in things)
        return tuple(relations), full and len({str(t) for t in things}) < len(things)

    true = {pattern(caption.text()) for _, _, said in told for caption in said}
    for _, _, wrong, _ in foils:
        assert pattern(wrong) in true, wrong
    for scene, _, wrong, _ in foils:
        shown = {(o.colour, o.shape) for o in scene.objects}
        new = {(t["colour"], t["shape"]) for t in parse(wrong)[0]} - shown
        assert not new & set(HELD_OUT), wrong


def still_life(*things):
    """A scene of (colour, shape, x, y), left to right, under a camera that looks along y."""
    camera = Camera(azimuth=0.0, elevation=0.6, distance=3.0, focal=2.9, height=0.3)
    objects = tuple(
        Object(shape, colour, "large", "matte", x, y, 0.0, 0.2) for colour, shape, x, y in things
    )
    return Scene(0, objects, camera, (0.0, 0.0, 1.0))


def test_depth_is_not_told_where_it_is_unclear():
    rng = np.random.default_rng(0)
    side_by_side = still_life(("red", "cube", -0.5, 0.0), ("blue", "cube", 0.5, 0.05))
    one_behind = still_life(("red", "cube", -0.5, 0.0), ("blue", "cube", 0.5, 0.8))
    told = {
        name: " ".join(c.text() for _ in range(20) for c in captions(scene, rng))
        for name, scene in [("level", side_by_side), ("deep", one_behind)]
    }
    assert "behind" not in told["level"] and "in front of" not in told["level"]
    assert "blue cube behind a large matte red cube" in told["deep"]
    assert "red cube in front of a large matte blue cube" in told["deep"]


def test_a_swapped_side_that_is_true_as_well_is_no_foil():
    twins = still_life(("red", "cube", -0.5, 0.0), ("red", "cube", 0.5, 0.0))
    rng = np.random.default_rng(0)
    said = [
        c
        for _ in range(20)
        for c in captions(twins, rng)
        if c.text() == "a red cube left of a red cube"
    ]
    assert said and all(foil(twins, caption, "side", rng) is None for caption in said)


# Questions.


def singular(word):
    return {"spheres": "sphere", "cubes": "cube", "cylinders": "cylinder"}.get(word, word)


def answer(text, scene):
    """The answer, by reading the question; an error where it has not exactly one."""
    objects = scene.objects

    def like(words):
        words = [singular(word) for word in words.split() if not word.startswith("object")]
        return [
            o for o in objects if all(w in (o.size, o.material, o.colour, o.shape) for w in words)
        ]

    if match := re.fullmatch(r"is there an? (.+)\?", text):
        return "yes" if like(match[1]) else "no"
    if match := re.fullmatch(r"how many (.+) are there\?", text):
        return str(len(like(match[1])))
    if match := re.fullmatch(r"what (colour|shape) is the (.+)\?", text):
        [thing] = like(match[2])
        return getattr(thing, match[1])
    match = re.fullmatch(r"which is left, the (.+) or the (.+)\?", text)
    [[first], [second]] = [like(match[1]), like(match[2])]
    left = scene.places()[[objects.index(first), objects.index(second)], 0]
    return match[1] if left[0] < left[1] else match[2]


def asked_of(split, count):
    rng = np.random.default_rng([2, count])
    return [
        (i, question)
        for i in range(count)
        for question in questions(scene_of(split, i), rng, compose=split == "test_composition")
    ]


def test_answers_are_right_and_questions_have_one():
    types = Counter()
    for split in ("val", "test_composition"):
        for number, question in asked_of(split, 70):
            scene = scene_of(split, number)
            assert answer(question.text, scene) == question.answer, question
            assert question.text.startswith(question.type)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", question.text)
            types[question.type] += 1
    assert set(types) == {"is there", "how many", "what colour", "what shape", "which is left"}
    assert min(types.values()) > 80


# What guessing evenly scores: of the answers that training's scenes allow for a text.
CHANCE = {
    "is there": 1 / 2,
    "how many": 1 / 2,
    "what colour": 1 / 5,
    "what shape": 1 / 2,
    "which is left": 1 / 2,
}


def test_the_words_of_a_question_do_not_give_its_answer():
    """The best guess from the text alone, learnt on train, is at chance on val."""
    seen = defaultdict(Counter)
    for _, question in balanced(asked_of("train", 800)):
        seen[question.text][question.answer] += 1
    right, total = Counter(), Counter()
    for _, question in balanced(asked_of("val", 300)):
        guess = seen[question.text].most_common(1)[0][0] if question.text in seen else ""
        right[question.type] += guess == question.answer
        total[question.type] += 1
    scores = {name: right[name] / total[name] for name in CHANCE}
    assert all(scores[name] < CHANCE[name] + 0.09 for name in CHANCE), scores


def test_balancing_caps_an_answer_at_the_second_most_frequent():
    def ask(answer, kind="how many", text="how many cubes are there?"):
        return Question(text, answer, kind)

    asked = list(enumerate(map(ask, "0011111000001122")))
    kept = balanced(asked)
    # 7 noughts, 7 ones, 2 twos: both in front are equal, so nothing goes.
    assert kept == asked
    kept = balanced([*asked, *((99, ask("1")) for _ in range(5))])
    assert Counter(q.answer for _, q in kept) == {"0": 7, "1": 7, "2": 2}
    assert kept == asked  # the first are kept, in order
    assert balanced([(0, ask("0"))] * 4) == []  # a text with one answer says it by itself
    once = [(0, ask("red", "what colour", "what colour is the cube?"))]
    assert balanced(once) == once
    assert set(UNEVEN) == {"is there", "how many"}
