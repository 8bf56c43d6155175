"""Zero-shot classification: images, or items of another modality, against the names of classes.

Radford et al. 2021 (CLIP), section 3.1. A folder of classes:

    golden_retriever/*.jpg   the class "golden retriever"; images may lie at any depth
    tabby-cat/part/*.png     the class "tabby cat"
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from unified_mm.data.images import SUFFIXES
from unified_mm.data.records import Problem
from unified_mm.evaluation import retrieval
from unified_mm.inference.classes import check_finite, class_embeddings, filled, templates_of
from unified_mm.inference.loaded import BATCH, LoadedModel, long_line, problems_of
from unified_mm.search.items import files_below, is_item, refuse_without_contrast, shown

ACCURACY_AT = (1, 5)
_NAMED = 10  # files named in an error


@dataclass(frozen=True)
class ClassFolder:
    """Items of a modality by class, in the order of their names.

    Attributes:
      path: the folder.
      classes: names of the classes in words.
      files: of the items, class by class.
      class_of_file: for each file, the index of its class in `classes`.
      others: number of files that are no items by their suffix, or lie outside the classes.
      of: the modality.
    """

    path: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    class_of_file: tuple[int, ...]
    others: int
    of: str = "image"


@dataclass(frozen=True)
class ZeroShot:
    """The scores of zero-shot classification.

    Attributes:
      scores: what the model reaches, by fixed names.
      chance: what guessing reaches, by the same names.
      images: number of items that were scored.
      problems: the items that were left out, and why.
      texts: number of sentences that stand for the classes.
      texts_cut: number of these sentences that are longer than the model reads.
      long: a line about items that are longer than the model hears; '' for none.
    """

    scores: dict[str, float]
    chance: dict[str, float]
    images: int
    problems: tuple[Problem, ...]
    texts: int
    texts_cut: int
    long: str = ""


def read_class_folder(
    folder: str | os.PathLike[str], *, of: str = "image", suffixes: Collection[str] = SUFFIXES
) -> ClassFolder:
    """Lists the items in the folder's directories, each of which is a class; decodes nothing.

    Underscores and hyphens of a directory's name become spaces. Names that begin with a dot are
    skipped.

    Args:
      folder: holds a directory for each class.
      of: the items' modality.
      suffixes: of their files.

    Raises:
      FileNotFoundError: there is no such folder, no directory in it, or one without an item.
      ValueError: there is only one class, or a name has no words, is not UTF-8, or is the same as
        another.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"the folder of classes {path} is no folder")
    there = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    directories = [entry for entry in there if entry.is_dir()]
    if not directories:
        raise FileNotFoundError(
            f"{path} holds no directories: {of}s must lie in one directory per class, named "
            "like the class"
        )
    if len(directories) == 1:
        raise ValueError(f"{path} holds one class alone, {directories[0].name}: none to choose")
    classes = class_names(directories)
    files: list[Path] = []
    class_of_file: list[int] = []
    others = len(there) - len(directories)
    for number, directory in enumerate(directories):
        found = list(files_below(directory))
        items = [file for file in found if is_item(file, suffixes)]
        if not items:
            raise FileNotFoundError(
                f"the class {directory} holds no {of} ({', '.join(sorted(suffixes))}); remove "
                f"its directory or put {of}s into it"
            )
        files += items
        class_of_file += [number] * len(items)
        others += len(found) - len(items)
    return ClassFolder(path, classes, tuple(files), tuple(class_of_file), others, of)


def class_names(directories: Sequence[Path]) -> tuple[str, ...]:
    """Returns the name in words of each directory's class.

    Raises:
      ValueError: a name has no words or is not UTF-8, or two names differ at most in case.
    """
    known: dict[str, Path] = {}
    names = []
    for directory in directories:
        name = " ".join(directory.name.replace("_", " ").replace("-", " ").split())
        if not name or shown(directory.name) != directory.name:
            raise ValueError(f"the class directory {shown(directory)} has no name in words")
        # Our tokenizers lower-case: what they make equal no model can tell apart.
        earlier = known.setdefault(name.lower(), directory)
        if earlier is not directory:
            raise ValueError(
                f"the classes {earlier.name} and {directory.name} in {directory.parent} are both "
                f"called {name.lower()!r}: rename one of them"
            )
        names.append(name)
    return tuple(names)


def classify_folder(
    model: LoadedModel,
    folder: ClassFolder,
    *,
    templates: Sequence[str] | None = None,
    max_bad_share: float = 0.05,
) -> ZeroShot:
    """Returns the accuracies of a model that knows the classes only by name.

    Items are read and embedded a batch at a time; those that cannot be read are left out.

    Args:
      model: the loaded model.
      folder: the items by class.
      templates: sentences with one `{}` for the class; by default those of `templates_of`.
      max_bad_share: of the items, how many may be left out.

    Raises:
      ValueError: the model has no contrast of the modality and text, a template is wrong,
        embeddings are not finite, or more than `max_bad_share` of the items or a whole class
        cannot be read.
    """
    from tqdm import tqdm

    refuse_without_contrast(model, f"classify {folder.of}s", "classification", folder.of)
    templates = templates_of(folder.of) if templates is None else templates
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share={max_bad_share}: must be a share in [0, 1]")
    space = model.predictor.task.space_of(folder.of).name
    embed_texts = partial(model.embed, of="text", objective=space)
    classes = class_embeddings(embed_texts, folder.classes, templates)
    starts = range(0, len(folder.files), BATCH)
    files = [folder.files[start : start + BATCH] for start in starts]
    parts, kept, problems, windows = [], [], [], []
    read = model.read_ahead(files, folder.of)
    progress = tqdm(starts, "classifying", unit="batch", disable=None)
    for start, batch, rows in zip(progress, files, read, strict=True):
        names = [shown(file.relative_to(folder.path)) for file in batch]
        problems += problems_of(names, rows)
        _refuse_bad(problems, folder, max_bad_share)
        good, embedded = model.embed_readable(rows, folder.of, space)
        check_finite(embedded, [shown(batch[i]) for i in good])
        parts.append(embedded)
        windows += [len(rows[i]) for i in good]
        kept += [start + i for i in good]
    labels = np.array(folder.class_of_file)[kept]
    _refuse_empty(labels, folder)
    texts = filled(templates, folder.classes)
    return ZeroShot(
        zero_shot_scores(np.concatenate(parts), classes, labels, folder.classes, folder.of),
        chance(folder.classes, folder.of),
        len(kept),
        tuple(problems),
        len(texts),
        sum(_is_cut(model, text) for text in texts),
        long_line(windows, folder.of),
    )


def zero_shot_scores(
    images: Float[np.ndarray, "images Z"],
    classes: Float[np.ndarray, "C Z"],
    class_of_image: Int[np.ndarray, " images"],
    names: Sequence[str],
    of: str = "image",
) -> dict[str, float]:
    """Returns the shares of images, or other items, whose class is among the nearest.

    A class that scores as high as the right one counts as nearer (see `retrieval.ranks`).

    Args:
      images: image embeddings [images, Z].
      classes: class embeddings [C, Z].
      class_of_image: index of each image's class [images]; every class has an image.
      names: names of the classes.
      of: the items' modality; of others than images the scores bear its name: `zero_shot/audio/...`

    Returns:
      By inner product, `zero_shot/accuracy_at_1`, `zero_shot/accuracy_at_5` where there are over 5
      classes, `zero_shot/mean_per_class` (every class counts alike, however many images it has) and
      for each class `zero_shot/accuracy/<class>`.

    Raises:
      ValueError: embeddings are not finite, there is no image, or an index is out of range.
    """
    # The rank of the class for each image: in retrieval, of the image for each text.
    rank = retrieval.ranks(classes, images, class_of_image).text_to_image
    by_class = [float(np.mean(rank[class_of_image == i] <= 1)) for i in range(len(names))]
    return _named({k: float(np.mean(rank <= k)) for k in _places(names)}, by_class, names, of)


def chance(names: Sequence[str], of: str = "image") -> dict[str, float]:
    """Returns the mean scores of random guessing, named as in `zero_shot_scores`."""
    count = len(names)
    return _named({k: k / count for k in _places(names)}, [1 / count] * count, names, of)


def _places(names: Sequence[str]) -> list[int]:
    return [k for k in ACCURACY_AT if k == 1 or len(names) > k]


def _named(
    overall: dict[int, float], by_class: list[float], names: Sequence[str], of: str
) -> dict[str, float]:
    prefix = "zero_shot" if of == "image" else f"zero_shot/{of}"
    return {
        **{f"{prefix}/accuracy_at_{k}": value for k, value in overall.items()},
        f"{prefix}/mean_per_class": float(np.mean(by_class)),
        **{f"{prefix}/accuracy/{name}": value for name, value in zip(names, by_class)},
    }


def _is_cut(model: LoadedModel, text: str) -> bool:
    """Returns whether a text with its end token is longer than the model, or its reader, reads."""
    reads = model.task.modalities["text"].reader or model.task.modalities["text"]
    return len(reads.tokenizer.encode_prompt(text)) >= reads.length


def _refuse_bad(problems: list[Problem], folder: ClassFolder, max_bad_share: float) -> None:
    bad, listed = len(problems), len(folder.files)
    if bad <= max_bad_share * listed:
        return
    first = ", ".join(f"{p.file} ({p.what})" for p in problems[:_NAMED])
    raise ValueError(
        f"at least {bad} of the {listed} {folder.of}s in {folder.path} are bad "
        f"({bad / listed:.1%}, allowed are {max_bad_share:.1%}), first {first}. Mend or remove "
        "them, or raise --max_bad_share"
    )


def _refuse_empty(labels: Int[np.ndarray, " images"], folder: ClassFolder) -> None:
    empty = sorted(set(range(len(folder.classes))) - set(labels.tolist()))
    if empty:
        names = ", ".join(folder.classes[i] for i in empty[:_NAMED])
        raise ValueError(
            f"{len(empty)} of the {len(folder.classes)} classes in {folder.path} have no "
            f"{folder.of} that can be read: {names}"
        )
