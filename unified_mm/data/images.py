"""Image files to uint8 RGB arrays, and the square views that models see."""

import functools
import importlib.util
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from unified_mm.data.records import Source, Stored

BACKENDS = ("pillow", "opencv")
RESAMPLINGS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FITS = ("crop", "crop_resized", "squash")
# What is taken for a picture by its name.
SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .ppm .tif .tiff .webp".split()
)

# Larger pictures are refused before they are decoded: a small file can hold a huge picture.
MAX_PIXELS = 64 * 1024 * 1024
_TURNED = range(2, 9)  # values of the EXIF tag 274 that turn or mirror the picture
# What a PNG's transparent grey is multiplied by where its pixels are: Pillow widens those alone.
_GREY_SCALES = {"L;2": 85, "L;4": 17}
_WITH_ALPHA = {"RGBA", "LA", "PA", "RGBa", "La"}
_SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "MPO": {".jpg", ".jpeg", ".mpo"},  # what some cameras call a JPEG
    "PNG": {".png", ".apng"},
    "TIFF": {".tif", ".tiff"},
}


class ImageError(ValueError):
    """An error for an image that cannot be decoded.

    Attributes:
      name: the image.
      what: what is wrong with it.
    """

    def __init__(self, name: str, what: str):
        super().__init__(name, what)  # both as args, so that it survives pickling
        self.name, self.what = name, what

    def __str__(self) -> str:
        return f"{self.name} cannot be decoded: {self.what}"


def resolve_backend(name: str) -> str:
    """Returns the image backend for a name: 'auto' is 'opencv' if that is installed, else 'pillow'.

    The two give slightly different pixels, so a run records what this returned.

    Raises:
      ValueError: the name is unknown.
      ImportError: 'opencv' is asked for and not installed.
    """
    installed = importlib.util.find_spec("cv2") is not None
    if name == "auto":
        return "opencv" if installed else "pillow"
    if name == "opencv" and not installed:
        raise ImportError("the image backend 'opencv' needs: pip install opencv-python-headless")
    if name not in BACKENDS:
        raise ValueError(f"unknown image backend {name!r}: use 'auto', 'pillow' or 'opencv'")
    return name


def decode(
    source: Source, at_least: int | None = None, *, backend: str = "pillow"
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image to upright RGB, 8 bits a channel, with transparency over white.

    Args:
      source: a path, the bytes of a file, or a stored image.
      at_least: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its short
        side keeps that many pixels.
      backend: 'pillow' or 'opencv'. The latter decodes plain JPEGs; everything else goes through
        Pillow under either name, so that a conversion has one definition.

    Raises:
      OSError: the file cannot be read.
      ImageError: the image cannot be decoded; the message names it.
      ValueError: the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown image backend {backend!r}: resolve_backend gives one")
    data, name = _read(source)
    try:
        image = _open(data)
        if backend == "opencv" and image.format == "JPEG" and image.mode == "RGB":
            return _decode_opencv(data, image.size, at_least)
        return _to_rgb(image, at_least)
    except Exception as error:  # decoders raise whatever their parsers meet
        raise ImageError(name, _reason(error)) from error


def from_pil(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an opened Pillow image as `decode` gives it.

    Raises:
      ImageError: the image cannot be decoded.
    """
    try:
        return _to_rgb(image, None)
    except Exception as error:  # decoders raise whatever their parsers meet
        raise ImageError(f"the {image.mode} picture", _reason(error)) from error


def check(source: Source, named: str | None = None) -> str | None:
    """Decodes an image completely and returns what `decode` has to convert in it, or None.

    A JPEG is decoded at an eighth of its size: every coded byte is read all the same.

    Args:
      source: a path, the bytes of a file, or a stored image.
      named: the file name of a source that is not a path; None if it has none.

    Raises:
      OSError: the file cannot be read.
      ImageError: the image cannot be decoded; the message names it.
    """
    data, name = _read(source)
    if isinstance(source, (str, os.PathLike)):
        named = name
    try:
        image = _open(data)
        conversion = _conversion(image, None if named is None else Path(named).suffix.lower())
        _to_rgb(image, at_least=1)
    except Exception as error:  # decoders raise whatever their parsers meet
        raise ImageError(name, _reason(error)) from error
    return conversion


def least_side(
    size: int, scale: tuple[float, float], ratio: tuple[float, float] = (1.0, 1.0)
) -> int:
    """Returns the `at_least` of `decode` that keeps training views of `size` from enlargement.

    Args:
      size: of the view, in pixels.
      scale: smallest and largest share of the image's area in a crop.
      ratio: smallest and largest width / height of a crop, whose short side is the shorter the
        further it is from 1.
    """
    longest = max(ratio[1], 1 / ratio[0], 1.0)
    return math.ceil(size * math.sqrt(longest) / math.sqrt(scale[0]))


def training_view(
    image: UInt8[np.ndarray, "height width 3"],
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    mirror: bool = False,
    resampling: str = "bicubic",
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a random crop, resized to a square.

    This is the Inception crop (Szegedy et al. 2015, arXiv:1409.4842, section 6), except that sides
    longer than the image are cut to it rather than drawn again.

    Args:
      image: the decoded image.
      size: the side of the view in pixels.
      rng: draws the crop.
      scale: the range of the crop's share of the image's area.
      ratio: the range of the crop's width to its height, drawn log-uniformly.
      mirror: whether to flip half of the views left-right.
      resampling: 'bilinear' or 'bicubic'.
    """
    height, width = image.shape[:2]
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_width = min(width, math.sqrt(area * aspect))
    crop_height = min(height, math.sqrt(area / aspect))
    left = rng.uniform(0, width - crop_width)
    top = rng.uniform(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    view = _resample(image, size, box, resampling)
    if mirror and rng.random() < 0.5:
        return np.ascontiguousarray(view[:, ::-1])
    return view


def evaluation_view(
    image: UInt8[np.ndarray, "height width 3"],
    size: int,
    *,
    resampling: str = "bicubic",
    fit: str = "crop",
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the image as a square, without randomness.

    Args:
      image: the decoded image.
      size: the side of the view in pixels.
      resampling: 'bilinear' or 'bicubic'.
      fit: 'crop', the central square, as large as the short side; 'crop_resized', the same with the
        short side resized to `size` first and whole pixels cut off then, as the preprocessors of
        many published weights do; 'squash', the whole image.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if fit == "squash":
        box = (0.0, 0.0, float(width), float(height))
    elif fit == "crop_resized":
        (left, right), (top, bottom) = (_whole_pixels(n, side, size) for n in (width, height))
        box = (left, top, right, bottom)
    else:
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return _resample(image, size, box, resampling)


def _whole_pixels(length: int, shortest: int, size: int) -> tuple[float, float]:
    """Returns where the middle `size` pixels of a side begin and end in the original image.

    The image is thought of as resized such that its short side, `shortest`, becomes `size`.
    """
    resized = int(size * length / shortest)
    start = (resized - size) // 2
    return start * length / resized, (start + size) * length / resized


def _resample(
    image: np.ndarray, size: int, box: tuple[float, float, float, float], resampling: str
) -> np.ndarray:
    # Pillow widens its kernel when it shrinks, so nothing aliases.
    picture = Image.fromarray(image).resize((size, size), RESAMPLINGS[resampling], box=box)
    return np.asarray(picture)


def _read(source: Source) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, f"an image of {len(source)} bytes"
    if isinstance(source, Stored):
        return source.read(), str(source)
    return Path(source).read_bytes(), str(source)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are over the limit of {MAX_PIXELS}")
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"  # Pillow's own text holds a memory address
    # Without counts of bytes in brackets, equal faults read alike and are counted together.
    return re.sub(r" \(.*\)$", "", str(error)) or type(error).__name__


def _conversion(image: Image.Image, suffix: str | None) -> str | None:
    format = image.format or "unknown"
    if suffix is not None and suffix not in _SUFFIXES.get(format, {suffix}):
        return f"{format} named {suffix or 'without a suffix'}"
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return "transparency"
    if image.mode.startswith("I") or any(
        ";16" in str(tile.args) for tile in getattr(image, "tile", ())
    ):
        return "16-bit"
    if image.mode != "RGB":
        return {"L": "greyscale", "P": "palette", "1": "black and white"}.get(
            image.mode, image.mode
        )
    if image.getexif().get(274) in _TURNED:
        return "turned by EXIF"
    return None


def _to_rgb(image: Image.Image, at_least: int | None) -> np.ndarray:
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    _widen_key(image)
    known_white = image.mode != "I" or image.format in ("PNG", "PPM", None)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _grey_to_rgb(image, known_white)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _widen_key(image: Image.Image) -> None:
    """Gives the transparent colour of a PNG the range that its pixels will have once loaded."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", ())
    pixels = str(tiles[0].args) if tiles else ""
    scale = next((by for name, by in _GREY_SCALES.items() if name in pixels), 1)
    if isinstance(key, int):
        image.info["transparency"] = scale * key
    elif isinstance(key, tuple) and ";16" in pixels:
        raise ValueError("a transparent colour of 16 bits: save it with 8 bits or an alpha channel")


def _grey_to_rgb(image: Image.Image, known_white: bool) -> np.ndarray:
    """Returns grey pixels of 16 bits, 65535 white, as RGB; the transparent grey is white too."""
    grey = np.asarray(image, np.int64)
    if not known_white or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("pixels of 32 bits have no defined white: save it with 8 or 16 bits")
    if isinstance(key := image.info.get("transparency"), int):
        grey = np.where(grey == key, 65535, grey)
    return np.repeat(np.rint(grey / 257).astype(np.uint8)[:, :, None], 3, axis=2)


def _decode_opencv(data: bytes, size: tuple[int, int], at_least: int | None) -> np.ndarray:
    cv2 = _opencv()
    flags = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2,
             4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}  # fmt: skip
    fits = min(size) // at_least if at_least else 1
    reduction = max(r for r in flags if r <= max(fits, 1))
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags[reduction])
    if image is None:
        raise ValueError("OpenCV finds no image in it")
    return image if reduction == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@functools.cache
def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(1)  # the reader's threads are the parallelism
    return cv2
