"""Which features of a TFDS dataset are the image, the captions, and what else there may be."""

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
TEXTS = ("text", "caption", "raw")  # in groups of captions
NEEDED = ("image", "captions")


class Roles(NamedTuple):
    """Names of features; '' for what a dataset does not tell.

    `text` is that of the text where `captions` is a sequence of groups.
    """

    image: str
    captions: str
    text: str
    id: str
    name: str
    mirrorable: str

    @property
    def features(self) -> tuple[str, ...]:
        """The features that are read."""
        names = (self.image, self.captions, self.id, self.name, self.mirrorable)
        return tuple(name for name in names if name)

    def captions_of(self, example: Mapping[str, Any], place: str) -> list[str]:
        """Raises ValueError, with the place, for a caption that is no UTF-8."""
        texts = example[self.captions]
        if self.text:
            texts = texts[self.text]
        try:
            return [_string(text) for text in ([texts] if isinstance(texts, bytes) else texts)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: {self.captions} is no UTF-8: prepare it again") from error

    def id_of(self, example: Mapping[str, Any], number: int) -> int | str:
        """The image's id; the example's number in its split where there is none."""
        if not self.id:
            return number
        value = example[self.id]
        return _string(value) if isinstance(value, (bytes, str)) else int(value)

    def name_of(self, example: Mapping[str, Any]) -> str | None:
        """The image's file name."""
        return _string(example[self.name], "backslashreplace") if self.name else None

    def mirrorable_of(self, example: Mapping[str, Any]) -> bool:
        """Whether flipping the image makes no caption false, as far as the dataset tells."""
        return bool(example[self.mirrorable]) if self.mirrorable else True


def choose_roles(features: Mapping[str, Any], asked: Mapping[str, str], where: str) -> Roles:
    """The features that `data.tfds` names, else those that are called as usual.

    `where` is the dataset, for messages. Raises ValueError that lists the features, for a name
    that there is not, none that is usual, or a feature of another kind.
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
    """The name of a role's feature, as `data.tfds` says it; '' where there need be none."""
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
    """The features in a group; nothing in another feature."""
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
