"""What needs no model of pictures and texts together: controls beside `configs/photographs.py`.

    python -m experiments.photograph_controls runs/mine

Reads the data, the tokenizer and the frozen eyes of a finished run. Ridge regression goes from the
mean of what the eyes see in a training picture to the shares of its captions that hold a word; it
finds pictures by their words, and reweighs a trigram model of the captions. The last control is the
caption of the nearest training picture. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.data.records import Record
from unified_mm.data.sources import open_source
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.evaluation.caption_scores import caption_scores, tokenize
from unified_mm.inference.loaded import LoadedModel, load
from unified_mm.search.cleaning import over_pictures

PICTURES = 4000  # that the regression learns from
TUNED = 500  # further ones, by which its strength and the mixture of the trigrams are chosen
RIDGES = (1e3, 3e3, 1e4, 3e4, 1e5)
TOKEN_RIDGE = 1e4
RARE = 5  # pictures that a word is in at least
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # by which the regression reweighs the trigrams
MIXTURES = [np.array([0.05, pairs, 0.95 - pairs]) for pairs in (0.25, 0.4, 0.55, 0.7)]
FEW = 100  # pictures that are enough to choose of these
Matrix = np.ndarray


def seen(model: LoadedModel, records: Sequence[Record]) -> Matrix:
    """Returns the mean of the eyes' features of each picture, [records, values]."""
    modality: Any = model.task.modalities["image"]
    params = model.params["embedders_image"]["stem"]
    stem = modality.embedding.make_stem()

    @jax.jit
    def look(params: Any, pixels: Any) -> Any:
        arrays = {"pixels": pixels, "present": jnp.ones(len(pixels), bool)}
        grid = modality.before_head(params, arrays, jnp.float32)
        return stem.apply({"params": params}, grid, method="head").mean((1, 2))

    files = [record.image for record in records]
    return over_pictures(modality, files, partial(look, params))


def shares(texts: Sequence[Sequence[Sequence[Any]]], places: dict[Any, int]) -> Matrix:
    """Returns the share of each picture's texts that hold a word, [pictures, words]."""
    found = np.zeros((len(texts), len(places)), np.float32)
    for row, own in enumerate(texts):
        for text in own:
            for place in {places[word] for word in text if word in places}:
                found[row, place] += 1 / len(own)
    return found


def regression(x: Matrix, y: Matrix, ridge: float) -> Any:
    """Returns the function of features that least squares with a ridge finds for `y`."""
    mean, spread, base = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    scaled = (x - mean) / spread
    gram = scaled.T @ scaled + ridge * np.eye(x.shape[1], dtype=np.float32)
    weights = np.linalg.solve(gram, scaled.T @ (y - base))
    return lambda features: (features - mean) / spread @ weights + base


def recalls(told: Matrix, asked: Matrix, own: Matrix, base: Matrix, rarity: Matrix) -> Matrix:
    """Returns the recall at 1 and at 10 of pictures, by the cosine with the words of a text."""
    pictures, texts = (told - base) * rarity, (asked - base) * rarity
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    scores = texts @ pictures.T
    ranks = (scores > scores[np.arange(len(own)), own][:, None]).sum(1)
    return np.array([(ranks < k).mean() for k in (1, 10)])


class Trigrams:
    """Trigrams of tokens, mixed with pairs and single ones."""

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.single = np.ones(vocabulary)
        self.after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for place in range(1, len(text)):
                self.single[text[place]] += 1
                for length in (1, 2):
                    if place >= length:
                        self.after[tuple(text[place - length : place])][text[place]] += 1
        self.single /= self.single.sum()

    def parts(self, text: Sequence[int]) -> Matrix:
        """Returns what orders one to three say of each token but the first, [3, T-1, V]."""
        found = np.zeros((3, len(text) - 1, len(self.single)))
        found[0] = self.single
        for place in range(1, len(text)):
            for order in (1, 2):
                counts = self.after.get(tuple(text[max(place - order, 0) : place]))
                if place < order or not counts:
                    found[order, place - 1] = found[order - 1, place - 1]
                    continue
                found[order, place - 1, list(counts)] = list(counts.values())
                found[order, place - 1] /= counts.total()
        return found


def nats(parts: Matrix, text: Sequence[int], mixture: Matrix, factor: Matrix) -> float:
    """Returns the nats a token of a text, reweighed by a factor for each token."""
    chances = np.tensordot(mixture, parts, 1) * factor
    right = chances[np.arange(len(text) - 1), list(text[1:])]
    return float(np.log(chances.sum(-1) / right).mean())


@dataclass(frozen=True)
class Photographs:
    """Pictures as the eyes see them, and their captions: learned from, tuned by, scored on."""

    features: Matrix
    texts: Sequence[Sequence[str]]
    learned: slice
    tuned: slice
    scored: slice


def photographs(model: LoadedModel) -> Photographs:
    """Returns those of a run."""
    source = open_source(model.config.data)
    train = source.manifest("train").records[: PICTURES + TUNED]
    val = source.manifest("val").records[: model.config.evaluation.max_images]
    learned = min(PICTURES, len(train) * 8 // 9)
    return Photographs(
        seen(model, (*train, *val)),
        [[each.target for each in record.texts] for record in (*train, *val)],
        slice(0, learned),
        slice(learned, len(train)),
        slice(len(train), None),
    )


def found_by_words(data: Photographs) -> dict[str, float]:
    """Returns the recall of pictures by the words that are expected of them."""
    words = [[tokenize(text) for text in own] for own in data.texts]
    learned = words[data.learned]
    common = Counter(word for own in learned for word in set(itertools.chain(*own)))
    known = [(word, count) for word, count in common.items() if count >= RARE]
    places = {word: place for place, (word, _) in enumerate(known)}
    rarity = np.log(len(learned) / np.array([count for _, count in known]))
    held = shares(learned, places)

    def recall(part: slice, ridge: float) -> Matrix:
        told = regression(data.features[data.learned], held, ridge)(data.features[part])
        asked = shares([[text] for own in words[part] for text in own], places)
        own = np.repeat(np.arange(len(told)), [len(each) for each in words[part]])
        return recalls(told, asked, own, held.mean(0), rarity)

    ridge = max(RIDGES, key=lambda each: recall(data.tuned, each)[1])
    at_1, at_10 = recall(data.scored, ridge).tolist()
    return {"ridge": ridge, "ridge/recall_at_1": at_1, "ridge/recall_at_10": at_10}


def told_by_trigrams(data: Photographs, tokenizer: TextTokenizer, length: int) -> dict[str, float]:
    """Returns the nats a token of trigrams that the regression reweighs, and what a picture gains.

    As of a model: of the first caption of each picture, beside its own one or another one.
    """

    def ids_of(text: str) -> list[int]:
        arrays = tokenizer.encode("", text, length)
        ids: list[int] = arrays["ids"][arrays["valid"]].tolist()
        return ids

    size = tokenizer.vocabulary_size
    ids = [[ids_of(text) for text in own] for own in data.texts]
    grams = Trigrams(list(itertools.chain(*ids[data.learned])), size)
    held = shares(ids[data.learned], {token: token for token in range(size)})
    told = regression(data.features[data.learned], held, TOKEN_RIDGE)(data.features)
    least = 1 / len(held)  # a regression may say less than nothing
    ratio = np.maximum(told, least) / np.maximum(held.mean(0), least)

    def mean_nats(part: slice, mixture: Matrix, power: float, moved: bool = False) -> float:
        first, factors = [own[0] for own in ids[part]], ratio[part] ** power
        factors = np.roll(factors, -(len(first) // 2), 0) if moved else factors
        pairs = zip(first, factors, strict=True)
        return float(np.mean([nats(grams.parts(text), text, mixture, f) for text, f in pairs]))

    few = slice(data.tuned.start, data.tuned.start + FEW)
    mixture = min(MIXTURES, key=lambda each: mean_nats(few, each, 0.0))
    power = min(POWERS, key=lambda each: mean_nats(few, mixture, each))
    own, other = (mean_nats(data.scored, mixture, power, moved) for moved in (False, True))
    plain = mean_nats(data.scored, mixture, 0.0)
    return {
        "trigrams/power": power,
        "trigrams/nats": own,
        "trigrams/nats_without_image": plain,
        "trigrams/image_gain": other - own,
    }


def copied_from_nearest(data: Photographs) -> dict[str, float]:
    """Returns the CIDEr-D of the first caption of the nearest training picture."""
    centred = data.features - data.features[data.learned].mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    nearest = (centred[data.scored] @ centred[: data.scored.start].T).argmax(1)
    copied = caption_scores([data.texts[place][0] for place in nearest], data.texts[data.scored])
    return {"nearest/cider_d": copied["cider_d"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    model = load(parser.parse_args().run)
    text: Any = model.task.modalities["text"]
    data = photographs(model)
    scores = found_by_words(data) | copied_from_nearest(data)
    print(json.dumps(scores | told_by_trigrams(data, text.tokenizer, text.length), indent=1))


if __name__ == "__main__":
    main()
