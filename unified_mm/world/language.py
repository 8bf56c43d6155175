"""Captions of a scene, captions made false by one word (foils), and questions with answers.

A caption is a structure first: objects, each described by some of its attributes, and relations
between them. A foil is a change of the structure, and `holds` decides whether a structure is true
of a scene.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from unified_mm.world.scenes import ATTRIBUTES, HELD_OUT, Object, Scene

Words = dict[str, str]  # some of an object's four words, by attribute
FULL = ("size", "material", "colour", "shape")
BRIEF = ("colour", "shape")
CLEAR_DEPTH = 0.25  # world units between things of which one is said to stand in front
KINDS = (*FULL, "side")
UNEVEN = ("is there", "how many")  # types of question that `balanced` thins out
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "in front of": "behind",
    "behind": "in front of",
}


@dataclass(frozen=True)
class Caption:
    """Objects in the order they are named, and the relation of each to the next.

    Attributes:
      things: the attributes that are named of each object.
      relations: between neighbours, `len(things) - 1` of them, as keys of `OPPOSITE`.
      opening: the words before the first object.
      spoken: the words for each relation: those of `relations` where it is stated, else commas and
        the like, where the opening states it for all.
    """

    things: tuple[Words, ...]
    relations: tuple[str, ...]
    opening: str
    spoken: tuple[str, ...]

    def text(self) -> str:
        """Returns the caption in words, in lower case."""
        parts = [with_article(self.things[0])]
        for word, thing in zip(self.spoken, self.things[1:], strict=True):
            joint = word if word.startswith(",") else f" {word}"
            parts.append(f"{joint} {with_article(thing)}")
        return (self.opening + "".join(parts)).strip()


def describe(words: Words) -> str:
    """Returns a description such as `large matte red cube`; without a shape, it says `object`."""
    said = [words[name] for name in FULL[:-1] if name in words]
    return " ".join([*said, words.get("shape", "object")])


def with_article(words: Words) -> str:
    """Returns a description with its article: `a large matte red cube`, `an orange cube`."""
    said = describe(words)
    return f"an {said}" if said[0] in "aeiou" else f"a {said}"


def captions(scene: Scene, rng: np.random.Generator) -> tuple[Caption, ...]:
    """Returns five different captions in random order, so that the first is of no special kind."""
    styles = _single(scene) if len(scene.objects) == 1 else _several(scene, rng)
    chosen = rng.permutation(len(styles))[:5]
    return tuple(styles[i] for i in chosen)


def _single(scene: Scene) -> list[Caption]:
    full, brief = _said(scene.objects[0], FULL), _said(scene.objects[0], BRIEF)
    openings = ("", "there is ", "here is just ", "the picture shows ", "on the ground lies ")
    return [
        *(Caption((full,), (), opening, ()) for opening in openings),
        Caption((brief,), (), "", ()),
    ]


def _several(scene: Scene, rng: np.random.Generator) -> list[Caption]:
    things = scene.objects  # from left to right
    full = tuple(_said(thing, FULL) for thing in things)
    brief = tuple(_said(thing, BRIEF) for thing in things)
    joints = len(things) - 1
    left, right = ("left of",) * joints, ("right of",) * joints
    listed = (",",) * (joints - 1) + ("and",)
    then = (", then",) * joints
    styles = [
        Caption(full, left, "", left),
        Caption(full[::-1], right, "", right),
        Caption(full, left, "from left to right, ", listed),
        Caption(full, left, "left to right: ", then),
        Caption(full[::-1], right, "from right to left, ", listed),
        Caption(brief, left, "", left),
    ]
    if len(things) > 2:
        styles.append(_pair(full, rng))
    depths = scene.places()[:, 2]
    order = np.argsort(depths)
    if np.diff(depths[order]).min() > CLEAR_DEPTH:
        near_first = tuple(full[i] for i in order)
        front, behind = ("in front of",) * joints, ("behind",) * joints
        styles += [
            Caption(near_first, front, "", front),
            Caption(near_first[::-1], behind, "", behind),
        ]
    return styles


def _pair(things: Sequence[Words], rng: np.random.Generator) -> Caption:
    """Returns a caption that relates two of the objects, which are given from left to right."""
    first, second = np.sort(rng.permutation(len(things))[:2])
    if rng.random() < 0.5:
        return Caption((things[first], things[second]), ("left of",), "", ("left of",))
    return Caption((things[second], things[first]), ("right of",), "", ("right of",))


def _said(thing: Object, names: Sequence[str]) -> Words:
    return {name: getattr(thing, name) for name in names}


def holds(caption: Caption, scene: Scene) -> bool:
    """Returns whether distinct objects of the scene match all that the caption says."""
    places = scene.places()

    def related(word: str, a: int, b: int) -> bool:
        axis, sign = {
            "left of": (0, 1),
            "right of": (0, -1),
            "in front of": (2, 1),
            "behind": (2, -1),
        }[word]
        return bool(sign * (places[b, axis] - places[a, axis]) > 0)

    def fits(chosen: Sequence[int]) -> bool:
        return all(
            all(getattr(scene.objects[i], name) == word for name, word in thing.items())
            for i, thing in zip(chosen, caption.things, strict=True)
        ) and all(
            related(word, a, b)
            for word, a, b in zip(caption.relations, chosen, chosen[1:], strict=False)
        )

    count = len(caption.things)
    return any(fits(chosen) for chosen in permutations(range(len(scene.objects)), count))


def foil(scene: Scene, caption: Caption, kind: str, rng: np.random.Generator) -> Caption | None:
    """Returns the caption with one word made false, or None if it has no such word.

    A foil cannot be recognized by its words alone: it says nothing that no true caption of training
    could say.

    Args:
      scene: the scene of which the caption is true.
      caption: the true caption.
      kind: the attribute to change, or 'side': `left of` for `right of` or the reverse.
      rng: draws the word.
    """
    changed = _other_side(caption) if kind == "side" else _other_word(caption, kind, rng)
    return changed if changed is not None and not holds(changed, scene) else None


def _other_word(caption: Caption, kind: str, rng: np.random.Generator) -> Caption | None:
    places = [i for i, thing in enumerate(caption.things) if kind in thing]
    if not places:
        return None
    place = int(rng.choice(places))
    thing = caption.things[place]
    article = with_article(thing).split()[0]
    swaps = [{**thing, kind: word} for word in ATTRIBUTES[kind] if word != thing[kind]]
    swaps = [
        swap
        for swap in swaps
        if with_article(swap).split()[0] == article
        and (swap["colour"], swap["shape"]) not in HELD_OUT
        and swap not in caption.things
    ]
    if not swaps:
        return None
    swapped = swaps[rng.integers(len(swaps))]
    things = (*caption.things[:place], swapped, *caption.things[place + 1 :])
    return replace(caption, things=things)


def _other_side(caption: Caption) -> Caption | None:
    # Of two things only: true captions of more never mix the two sides.
    if caption.spoken not in (("left of",), ("right of",)):
        return None
    swapped = (OPPOSITE[caption.spoken[0]],)
    return replace(caption, relations=swapped, spoken=swapped)


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
      type: how the question begins, as VQA v2 groups them.
    """

    text: str
    answer: str
    type: str


def questions(scene: Scene, rng: np.random.Generator, *, compose: bool) -> list[Question]:
    """Returns one question of each type that the scene allows.

    They are drawn such that the words of a question make no answer likelier, where that can be done
    for one scene; for the rest there is `balanced`.

    Args:
      scene: the scene.
      rng: draws the questions.
      compose: whether pairs of colour and shape that training never shows may be asked for.
    """
    asked = [
        _is_there(scene, rng, compose),
        _how_many(scene, rng),
        _what(scene, rng, "colour", "shape"),
        _what(scene, rng, "shape", "colour"),
        _which_is_left(scene, rng),
    ]
    return [question for question in asked if question is not None]


def _is_there(scene: Scene, rng: np.random.Generator, compose: bool) -> Question:
    shown = sorted({(thing.colour, thing.shape) for thing in scene.objects})
    possible = [
        (colour, shape)
        for colour in ATTRIBUTES["colour"]
        for shape in ATTRIBUTES["shape"]
        if compose or (colour, shape) not in HELD_OUT
    ]
    yes = rng.random() < 0.5
    pairs = shown if yes else [pair for pair in possible if pair not in shown]
    colour, shape = pairs[rng.integers(len(pairs))]
    thing = with_article({"colour": colour, "shape": shape})
    return Question(f"is there {thing}?", "yes" if yes else "no", "is there")


def _how_many(scene: Scene, rng: np.random.Generator) -> Question:
    name = str(rng.choice(["shape", "material", "size"]))
    counts = {
        word: sum(getattr(thing, name) == word for thing in scene.objects)
        for word in ATTRIBUTES[name]
    }
    word = str(rng.choice(list(counts)))
    said = f"{word}s" if name == "shape" else f"{word} objects"
    return Question(f"how many {said} are there?", str(counts[word]), "how many")


def _what(scene: Scene, rng: np.random.Generator, asked: str, by: str) -> Question | None:
    counts = Counter(getattr(thing, by) for thing in scene.objects)
    unique = [thing for thing in scene.objects if counts[getattr(thing, by)] == 1]
    if not unique:
        return None
    thing = unique[rng.integers(len(unique))]
    said = describe({by: getattr(thing, by)})
    return Question(f"what {asked} is the {said}?", getattr(thing, asked), f"what {asked}")


def _which_is_left(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = Counter((thing.colour, thing.shape) for thing in scene.objects)
    unique = [thing for thing in scene.objects if counts[thing.colour, thing.shape] == 1]
    if len(unique) < 2:
        return None
    first, second = sorted(rng.choice(len(unique), 2, replace=False))
    pair = [describe(_said(unique[i], BRIEF)) for i in (first, second)]
    left = pair[0]
    shown = pair if rng.random() < 0.5 else pair[::-1]
    return Question(f"which is left, the {shown[0]} or the {shown[1]}?", left, "which is left")


def balanced(asked: Iterable[tuple[int, Question]]) -> list[tuple[int, Question]]:
    """Returns questions without those that make one answer to a text likelier than all others.

    Of the types whose answers are not equally likely from the start, no answer to a text is kept
    more often than the second most frequent one.
    """
    asked = list(asked)
    counts: dict[str, Counter[str]] = {}
    for _, question in asked:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    most = {text: sorted(by.values())[-2] if len(by) > 1 else 0 for text, by in counts.items()}
    kept: Counter[tuple[str, str]] = Counter()
    chosen = []
    for number, question in asked:
        key = (question.text, question.answer)
        if question.type not in UNEVEN or kept[key] < most[question.text]:
            kept[key] += 1
            chosen.append((number, question))
    return chosen
