"""The choice of the features of a TFDS dataset that are images, captions and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# What features are called, where `data.tfds` does not say; the first that is there counts.
USUAL = {
    "image": ("image",),
    "captions": ("captions", "caption", "text"),
    "id": ("image/id", "image_id", "id"),
    "name": ("image/filename", "image/file_name", "filename", "file_name"),
    "mirrorable": ("mirrorable",),
}
TEXTS = ("text", "caption", "raw")  # names of the text in a group of captions
# What `unified_mm.prepare` calls the files of other modalities, and what it tells beside them, as
# JSON: the files' names by modality, the labels, and the prompt of each caption.
PART, TOLD = "parts/{}", "told"
NEEDED = ("image", "captions")


class Roles(NamedTuple):
    """The names of a dataset's features; '' for what the dataset lacks.

    Attributes:
      text: the name of the text, where `captions` is a sequence of groups.
    """

    image: str
    captions: str
    text: str
    id: str
    name: str
    mirrorable: str

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features that are read."""
        names = (self.image, self.captions, self.id, self.name, self.mirrorable)
        return tuple(name for name in names if name)

    def captions_of(self, example: Mapping[str, Any], place: str) -> list[str]:
        """Returns the captions of an example.

        Raises:
          ValueError: a caption is not UTF-8; the message begins with `place`.
        """
        texts = example[self.captions]
        if self.text:
            texts = texts[self.text]
        try:
            return [_string(text) for text in ([texts] if isinstance(texts, bytes) else texts)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: {self.captions} is no UTF-8: prepare it again") from error

    def id_of(self, example: Mapping[str, Any], number: int) -> int | str:
        """Returns the image's id, or the example's number in its split if it has none."""
        if not self.id:
            return number
        value = example[self.id]
        return _string(value) if isinstance(value, (bytes, str)) else int(value)

    def name_of(self, example: Mapping[str, Any]) -> str | None:
        """Returns the image's file name, None if the dataset has none."""
        return _string(example[self.name], "backslashreplace") if self.name else None

    def mirrorable_of(self, example: Mapping[str, Any]) -> bool:
        """Returns whether flipping the image keeps all captions true; True if not recorded."""
        return bool(example[self.mirrorable]) if self.mirrorable else True


def choose_roles(features: Mapping[str, Any], asked: Mapping[str, str], where: str) -> Roles:
    """Returns the features that `data.tfds` names, or else those with usual names.

    Args:
      features: the dataset's features by name.
      asked: `data.tfds`, a name for each role; '' for the usual one.
      where: the dataset, for messages.

    Raises:
      ValueError: a name is unknown, no usual name is there, or a feature is of the wrong kind; the
        message lists the features.
    """
    chosen = {role: _choice(role, features, asked, where) for role in USUAL}
    captions, _, text = chosen.pop("captions").partition(".")
    kind = getattr(features[captions], "feature", features[captions])  # of a sequence's members
    group = _members(kind)
    if group:
        text = text or next((name for name in TEXTS if name in group), "")
        kind = group.get(text)
    if not _is_text(kind) or (text and not group):
        raise _wrong("captions", asked, f"{captions} holds no text", features, where)
    for role, fits, wanted in (
        ("image", _is_image, "an image of 8 or 16 bits"),
        ("id", _is_id, "a whole number or a text"),
        ("name", _is_text, "a text"),
        ("mirrorable", _is_truth, "a truth value"),
    ):
        name = chosen[role]
        if name and not fits(features[name]):
            raise _wrong(role, asked, f"{name} is not {wanted}", features, where)
    return Roles(captions=captions, text=text, **chosen)


def _choice(role: str, features: Mapping[str, Any], asked: Mapping[str, str], where: str) -> str:
    """Returns the name of a role's feature as in `data.tfds`; '' if an optional one is absent."""
    name = asked[role]
    if name:
        if name in features or (role == "captions" and name.partition(".")[0] in features):
            return name
        raise _wrong(role, asked, "there is no such feature", features, where)
    found = next((usual for usual in USUAL[role] if usual in features), "")
    if role in NEEDED and not found:
        looked_for = ", ".join(USUAL[role])
        raise _wrong(role, asked, f"none is called as usual ({looked_for})", features, where)
    return found


def _wrong(
    role: str, asked: Mapping[str, str], fault: str, features: Mapping[str, Any], where: str
) -> ValueError:
    there = "; ".join(f"{name}: {_said(feature)}" for name, feature in sorted(features.items()))
    return ValueError(
        f"data.tfds.{role}={asked[role]!r}: {fault}. The features of {where} are {there}. Name "
        f"one of them{', or one in a group as captions.text' if role == 'captions' else ''}"
    )


def _said(feature: Any) -> str:
    return " ".join(repr(feature).split())


def _members(feature: Any) -> dict[str, Any]:
    """Returns the features in a group; none for another feature."""
    import tensorflow_datasets as tfds

    return dict(feature.items()) if isinstance(feature, tfds.features.FeaturesDict) else {}


def _is_scalar(feature: Any, kinds: str) -> bool:
    shape: Sequence[int] | None = getattr(feature, "shape", None)
    return shape == () and np.dtype(feature.np_dtype).kind in kinds


def _is_text(feature: Any) -> bool:
    return _is_scalar(feature, "OSU")


def _is_id(feature: Any) -> bool:
    return _is_scalar(feature, "iuOSU")


def _is_truth(feature: Any) -> bool:
    return _is_scalar(feature, "b")


def _is_image(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Image) and np.dtype(feature.np_dtype).kind == "u"


def _string(value: bytes | str, errors: str = "strict") -> str:
    return value.decode(errors=errors) if isinstance(value, bytes) else value
