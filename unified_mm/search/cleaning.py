"""Filters of `unified_mm.clean` that ask a model: what looks alike, what captions do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from unified_mm.config import Config, option
from unified_mm.data.cleaning import Case, Pictures, has_picture
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.inference.imported import import_directory
from unified_mm.inference.loaded import LoadedModel, load
from unified_mm.pretrained.hub import PACKAGE, directory_of
from unified_mm.task import build_task

BATCH = 64
BLOCK = 1024  # vectors that are compared with all before them at once
ROUNDS = 10  # of k-means
Vectors = Float[np.ndarray, "vectors Z"]


@dataclass(frozen=True)
class Alike:
    """Items whose embeddings are nearly those of another one (SemDeDup, Abbas et al. 2023).

    The one that is scored on stays, else the first.

    Attributes:
      threshold: 1 - cosine up to which two items are one. The default is for EfficientNet-Lite0:
        a run's own space wants one that its report page shows.
      run: a run with contrast; or weights of a stem (`package:NAME/FOLDER`), whose last grid of
        features is averaged.
      side: pixels on a side of what such a stem sees.
      of: the modality of the items: pictures, or sounds, clips or shapes that a run embeds.
      cluster: items that are compared with each other. Where there are more, k-means divides
        them into clusters of about as many, and pairs of two clusters are not found.
    """

    threshold: float = 0.12
    run: str = ""
    side: int = option(112, least=32)
    of: str = "image"
    cluster: int = option(50_000, least=2)

    def __post_init__(self) -> None:
        refuse_no_run(self.run, "alike")
        if self.of != "image" and self.run.startswith(PACKAGE):
            raise ValueError(f"--filter=alike,of={self.of}: {self.run} sees pictures; give a run")

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        places = np.flatnonzero([self.of in record.parts for record in pictures.records])
        if not places.size:
            raise ValueError(f"--filter=alike,of={self.of}: no example has a part of that name")
        vectors = self.embed([pictures.records[place].parts[self.of] for place in places])
        members = clustered(vectors, self.cluster)
        for number in range(members.max() + 1):
            own = np.flatnonzero(members == number)
            for one, other, distance in near_ones(vectors[own], 2 * self.threshold):
                place, kept = int(places[own[one]]), int(places[own[other]])
                if pictures.trained[place]:
                    yield Case(place, distance, "alike", kept)

    def embed(self, files: Sequence[Any]) -> Vectors:
        """Returns unit vectors of items."""
        if self.run.startswith(PACKAGE):
            return stem_of(self.run, self.side)(files)
        return seen_by(load(self.run), files, self.of)


@dataclass(frozen=True)
class Mismatched:
    """Pictures that their captions do not fit, as a run with contrast of both says.

    Attributes:
      threshold: the share of all that fit worst; or by 'cosine', the mean cosine of a picture with
        its captions up to which they do not fit.
      run: the run.
      by: what `threshold` is of.
    """

    threshold: float = 0.1
    run: str = ""
    by: str = option("share", choices=("share", "cosine"))

    def __post_init__(self) -> None:
        refuse_no_run(self.run, "mismatched")

    def __call__(self, pictures: Pictures) -> Iterator[Case]:
        captions = [
            [text.target for text in record.texts if not text.prompt] for record in pictures.records
        ]
        told = np.array([len(each) > 0 for each in captions])
        places = np.flatnonzero(has_picture(pictures) & told)
        files = [pictures.records[place].image for place in places]
        cosines = agreement(load(self.run), files, [captions[place] for place in places])
        ranks = (cosines.argsort().argsort() + 1) / max(len(places), 1)
        measures = ranks if self.by == "share" else cosines
        for number in np.flatnonzero(measures <= self.threshold + abs(self.threshold)):
            place = int(places[number])
            reason = f"a cosine of {cosines[number]:.3f} with {captions[place][0]!r}"
            yield Case(place, float(measures[number]), reason)


def refuse_no_run(run: str, name: str) -> None:
    """Raises ValueError if a filter that asks a model was not told which."""
    if not run:
        raise ValueError(f"--filter={name} asks a run: give it, as in --filter={name},run=runs/1")


def seen_by(model: LoadedModel, files: Sequence[Any], of: str = "image") -> Vectors:
    """Returns unit vectors of the items of a modality.

    Raises:
      ValueError: one of them cannot be read.
    """
    _, vectors, problems = model.embed_files(files, of)
    if problems:
        raise ValueError(f"{problems[0].file}: {problems[0].what}")
    return vectors


def agreement(
    model: LoadedModel, files: Sequence[Any], captions: Sequence[Sequence[str]]
) -> Float[np.ndarray, " files"]:
    """Returns the mean cosine of each picture with its captions, one at least."""
    seen = seen_by(model, files)
    read = model.embed_texts([text for each in captions for text in each])
    of = np.repeat(np.arange(len(files)), [len(each) for each in captions])
    cosines = (seen[of] * read).sum(1)
    return np.bincount(of, cosines, len(files)) / np.bincount(of, minlength=len(files))


def stem_of(given: str, side: int) -> Callable[[Sequence[Any]], Vectors]:
    """Returns the function of picture files that averages a stem's last grid of features.

    Raises:
      ValueError: the weights are of no stem.
    """
    imported = import_directory(directory_of(given))
    if imported.part != "stem":
        raise ValueError(f"run={given} holds no stem of images: import it and give the run")
    imported.config["data"]["image_size"] = side
    task = build_task(Config(imported.config), TextTokenizer.train([], 260))  # it reads no text
    modality: Any = task.modalities["image"]
    params = imported.params["embedders_image"]["stem"]

    @jax.jit
    def look(params: Any, pixels: Any) -> Any:
        arrays = {"pixels": pixels, "present": jnp.ones(len(pixels), bool)}
        features = modality.before_head(params, arrays, jnp.float32)
        return features.mean((1, 2))

    return lambda files: normalised(over_pictures(modality, files, partial(look, params)))


def over_pictures(
    modality: Any, files: Sequence[Any], look: Callable[[Any], Any]
) -> Float[np.ndarray, "files values"]:
    """Returns what a function says of the pixels [BATCH, height, width, 3] of pictures."""
    parts = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            pixels = np.stack(list(pool.map(lambda file: modality.view(file, None, False), part)))
            filled = np.resize(pixels, (BATCH, *pixels.shape[1:]))  # one shape is compiled
            parts.append(np.asarray(look(filled))[: len(pixels)])
    return np.concatenate(parts)


def normalised(vectors: Vectors) -> Vectors:
    found: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found


def clustered(vectors: Vectors, size: int, seed: int = 0) -> Int[np.ndarray, " vectors"]:
    """Returns the cluster of each vector by spherical k-means; all are in one up to `size`."""
    count = -(-len(vectors) // size)
    members = np.zeros(len(vectors), int)
    if count < 2:
        return members
    start = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    centres = vectors[start]
    for _ in range(ROUNDS):
        members = (vectors @ centres.T).argmax(1)
        sums = np.zeros_like(centres)
        np.add.at(sums, members, vectors)
        centres = normalised(sums)
    return members


def near_ones(vectors: Vectors, most: float) -> Iterator[tuple[int, int, float]]:
    """Yields later and earlier vector of each pair whose 1 - cosine is at most `most`, and that."""
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK]
        distances = 1 - rows @ vectors[: start + len(rows)].T
        later, earlier = np.nonzero(np.tril(distances <= most, start - 1))
        for one, other in zip(later.tolist(), earlier.tolist(), strict=True):
            yield start + one, other, float(distances[one, other])
