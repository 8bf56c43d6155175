"""The preprocessing of images and sounds that pretrained weights were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unified_mm.data.sounds import RATE
from unified_mm.pretrained.source import Section, Source

RESAMPLINGS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
FILES = tuple(f"{name}_config.json" for name in ("preprocessor", "processor", "video_preprocessor"))


@dataclass(frozen=True)
class Preprocessing:
    """The usual preprocessing of a family, and its patches, for what no file says.

    Attributes:
      fit: how an image that is not square becomes one (`data.images.evaluation_view`).
      resampling: filter that resizes images, as in `config.data.resampling`.
      mean: mean of each colour, as in `config.model.modalities.image`.
      std: standard deviation of each colour, as in `config.model.modalities.image`.
      patch: pixels on a side of a patch.
    """

    fit: str
    resampling: str = "bicubic"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    patch: int = 16


def image_fields(source: Source, vision: Section, usual: Preprocessing) -> tuple[dict, dict]:
    """Returns the fields of `config.data` and of `config.model.modalities.image`.

    Args:
      source: directory that may hold a preprocessor_config.json, or a processor_config.json with
        the same inside; without either, `usual` holds.
      vision: the image tower's section of config.json: side, colours and patches of its images.
      usual: the usual preprocessing of the family.

    Raises:
      ValueError: if the images or their preprocessing are not supported; the message names file
        and key.
    """
    vision.refuse_unless("num_channels", 3, why="pictures have three colours here")
    section = _section(source, "image_processor", "video_processor")
    size = vision.get("image_size", 224)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        section.refuse_unless(key, True, None, why="pictures are resized and normalised here")
    section.refuse_unless("do_pad", False, None, why="pictures are cut to squares, not padded")
    factor = section.get("rescale_factor", 1 / 255)
    if abs(factor - 1 / 255) > 1e-9:
        raise ValueError(f"{section.where}: rescale_factor={factor}: only 1/255 is done here")
    number = section.get("resample")
    if number is not None and number not in RESAMPLINGS:
        raise ValueError(f"{section.where}: resample={number}: only {RESAMPLINGS} are done here")
    data = {
        "image_size": size,
        "resampling": usual.resampling if number is None else RESAMPLINGS[number],
        "fit": _fit(section, size, usual.fit),
    }
    patch = vision.get("patch_size", usual.patch)
    embedding = {
        "patch": patch,
        "cut_rest": bool(size % patch),
        "mean": list(section.get("image_mean") or usual.mean),
        "std": list(section.get("image_std") or usual.std),
    }
    return data, embedding


def preprocessor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of preprocessor_config.json for a run's config."""
    size = config["data"]["image_size"]
    image = config["model"]["modalities"]["image"]
    crop = config["data"]["fit"] != "squash"
    sides = {"height": size, "width": size}
    numbers = {name: number for number, name in RESAMPLINGS.items()}
    return {
        "do_resize": True,
        "size": {"shortest_edge": size} if crop else sides,
        "resample": numbers[config["data"]["resampling"]],
        "do_center_crop": crop,
        **({"crop_size": sides} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image["mean"]),
        "image_std": list(image["std"]),
    }


def sound_section(source: Source) -> Section:
    """Returns what is said of spectrograms, which are of sounds at 16 kHz.

    Raises:
      ValueError: they are of others.
    """
    section = _section(source, "feature_extractor")
    refuse_other(section, {"sampling_rate": RATE}, "sounds are heard at that rate here")
    return section


def refuse_other(section: Section, wanted: Mapping[str, Any], why: str) -> None:
    """Raises ValueError for a key that has another value than is wanted, where it is there."""
    for key, value in wanted.items():
        said = f"only {key}={value} is read, for {why}"
        section.refuse_unless(key, value, None, why=said)


def _section(source: Source, *keys: str) -> Section:
    for name in FILES:
        found = source.json(name)
        if found is not None:
            inside = next((found[key] for key in keys if key in found), found)
            return Section(str(source.path / name), inside)
    return Section("", {})


def _fit(section: Section, size: int, usual: str) -> str:
    """Returns the value of `config.data.fit` that makes an image a square as the file says.

    Raises:
      ValueError: if the file does not give a square of `size` pixels on a side.
    """
    asked = section.get("size", section.get("image_size"))
    if asked is None:
        return usual
    if isinstance(asked, int):  # older files: the family says which side is meant
        asked = {"shortest_edge": asked} if usual != "squash" else {"height": asked, "width": asked}
    sides = {value for value in asked.values() if value is not None}
    if sides != {size}:
        raise ValueError(
            f"{section.where}: size={asked}, but the model takes {size} x {size} pixels"
        )
    if "shortest_edge" not in asked:
        return "squash"
    crop = section.get("crop_size", size)
    if section.get("do_center_crop") is False or _sides(crop) != {size}:
        raise ValueError(
            f"{section.where}: size={asked} needs do_center_crop and crop_size={size}, to give "
            "the square that the model takes"
        )
    return "crop_resized"


def _sides(value: Any) -> set[int]:
    return set(value.values()) if isinstance(value, Mapping) else {value}
