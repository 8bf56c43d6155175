"""Embeddings of classes for zero-shot classification, from the classes' names in several sentences.

Radford et al. 2021 (CLIP), section 3.1.4.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a picture of the {}.",
    "a {} seen from close by.",
    "a {} seen from afar.",
    "there is a {} in the picture.",
)


def templates_of(modality: str) -> tuple[str, ...]:
    """Returns the default templates of a modality; of others than images the name alone."""
    return TEMPLATES if modality == "image" else ("{}",)


def class_embeddings(
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Float[np.ndarray, "C Z"]:
    """Returns a unit vector for each class, float32: the mean of its filled templates, normalised.

    Args:
      embed_texts: texts -> their unit vectors [B, Z].
      classes: the name of each class, as it is put into the templates.
      templates: sentences with one `{}`.

    Raises:
      ValueError: no class, no template, a template without one plain `{}`, or embeddings that are
        not finite or cancel out.
    """
    if not classes:
        raise ValueError("no class is named: give one name per class")
    vectors = embed_texts(filled(templates, classes))
    mean = vectors.reshape(len(classes), len(templates), -1).mean(1, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # the check names what came of it
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    check_finite(mean, [f"class {name!r}" for name in classes])
    return mean.astype(np.float32)


def filled(templates: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Fills every template with every name, class by class.

    Raises:
      ValueError: no template, or one that `check_template` refuses.
    """
    if not templates:
        raise ValueError("no template is given: '{}' is the name alone")
    for template in templates:
        check_template(template)
    return [template.format(name) for name in classes for template in templates]


def check_template(template: str) -> None:
    """Checks that a template has one `{}` and no other field.

    Raises:
      ValueError: it has not.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r} is not well formed: {error}") from error
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if fields != [("", "", None)]:
        raise ValueError(
            f"the template {template!r} must have the class's place, {{}}, once and no other "
            "field, such as 'a photo of a {}.'"
        )


def check_finite(embeddings: Float[np.ndarray, "rows Z"], names: Sequence[str]) -> None:
    """Checks that all embeddings are finite.

    Raises:
      ValueError: some are not; the message says how many, and the name of the first.
    """
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(embeddings)} embeddings are not finite (first: {names[bad[0]]}): "
            "similarities would mean nothing. Look for a diverged run or a bad input"
        )
