"""Uploaded pictures, checked before they are decoded, and pictures shown, which are re-encoded."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from unified_mm.data import images
from unified_mm.inference.loaded import LoadedModel
from unified_mm.serving.limits import Limits, Refusal

# The rest of Pillow's decoders are for files that one has chosen oneself.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SHOWN = 512  # pixels on the longer side of a picture that is shown


def view_of(
    model: LoadedModel, data: bytes, limits: Limits, place: str
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns an uploaded picture as the model sees it (`LoadedModel.view`).

    Args:
      data: the file's bytes.
      place: the field that it came in, for messages.

    Raises:
      Refusal: 415 no picture of a format that is read, 413 too many pixels, 422 a broken one.
    """
    check_header(data, limits, place)
    modality = model.task.modalities["image"]
    try:
        return model.view(images.decode(data, at_least=modality.size, backend=modality.decoder))
    except ValueError as error:
        what = error.what if isinstance(error, images.ImageError) else str(error)
        raise Refusal(422, "broken_picture", f"{place}: cannot be decoded: {what}") from error


def check_header(data: bytes, limits: Limits, place: str) -> None:
    """Raises Refusal for what is no picture or has too many pixels; decodes none of them."""
    known = ", ".join(FORMATS)
    if not data:
        raise Refusal(422, "no_picture", f"{place}: the file is empty; send one of {known}")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many(place, "far more pixels than", limits) from error
    except Image.UnidentifiedImageError as error:
        message = f"{place}: these {len(data)} bytes are no picture that is read here ({known})"
        raise Refusal(415, "no_picture", message) from error
    except Exception as error:  # decoders raise whatever their parsers meet
        message = f"{place}: its header is broken ({type(error).__name__})"
        raise Refusal(422, "broken_picture", message) from error
    if width * height > limits.pixels:
        raise _too_many(place, f"{width} x {height} pixels, over", limits)


def shown(data: bytes) -> bytes:
    """Returns a picture of the index as a small JPEG.

    It is made from the pixels alone: nothing else of the file, such as its metadata, is passed on.

    Raises:
      ImageError: the picture cannot be decoded.
    """
    picture = Image.fromarray(images.decode(data, at_least=SHOWN))
    picture.thumbnail((SHOWN, SHOWN))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    return out.getvalue()


def _too_many(place: str, what: str, limits: Limits) -> Refusal:
    message = f"{place}: the picture has {what} the limit of {limits.pixels}; make it smaller"
    return Refusal(413, "too_many_pixels", message)
