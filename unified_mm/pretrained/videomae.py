"""VideoMAE's encoder (Tong et al. 2022): a video tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.family import Family, prefix
from unified_mm.pretrained.fields import STACK, Fields, read, tower_alone, usual
from unified_mm.pretrained.layers import blocks, dense, norm, start_of_tower, tower_options
from unified_mm.pretrained.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    image_fields,
)
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table, rearranged
from unified_mm.pretrained.vit import BLOCK

KEYS = usual(STACK, norm_epsilon=1e-12)
USUAL = Preprocessing("crop_resized", "bilinear", IMAGENET_MEAN, IMAGENET_STD)
# What older files call the biases; keys have none.
BIASES = {"query_bias": "attention.attention.q_bias", "value_bias": "attention.attention.v_bias"}


def fields(source: Source) -> Fields:
    """Returns the fields of a tower of tubelets at fixed positions, pooled by their mean."""
    c = source.config
    data, pixels = image_fields(source, c, USUAL)
    if pixels.pop("cut_rest"):
        size, patch = data["image_size"], pixels["patch"]
        raise ValueError(f"{c.where}: image_size={size} is no multiple of patch_size={patch}")
    video = {
        **pixels,
        "frames": c.get("num_frames", 16),
        "tubelet": c.get("tubelet_size", 2),
        "positions": "fixed",
        "modality_embedding": False,
    }
    tower = {
        **read(c, KEYS),
        "query_bias": bool(c.get("qv_bias", c.get("qkv_bias", True))),
        "final_norm": not c.get("use_mean_pooling", True),
    }
    return {"data": data, **tower_alone("video", video, tower, pool="mean")}


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of the weights without a classifier or the decoder of pixels."""
    model = config["model"]
    video, options = model["modalities"]["video"], tower_options(model)
    before = prefix(names, "videomae.", probe="embeddings.patch_embeddings.projection.weight")
    older = any(name.endswith(".q_bias") for name in names)
    block = {**BLOCK, **(BIASES if older else {}), "key_bias": ""}
    pixels = rearranged(
        "d channels frames rows columns",
        "(frames rows columns channels) d",
        channels=3,
        frames=video["tubelet"],
        rows=video["patch"],
    )
    projection = f"{before}embeddings.patch_embeddings.projection"
    entries = [
        *dense(projection, "embedders_video/patches", True, pixels),
        *blocks(f"{before}encoder.layer.{{layer}}", "towers_video", block, options),
    ]
    if options.final_norm:
        entries += norm(f"{before}layernorm", "towers_video/norm")
    ignored = {
        r"(fc_norm|classifier)\..*": "the classifier: a video tower has none",
        r"(decoder|encoder_to_decoder)\..*|mask_token": "the decoder of masked pixels",
    }
    return Table(entries, ignored, starts=start_of_tower("video", options.query_bias))


VIDEOMAE = Family("VideoMAE", ("videomae",), "video", fields, table)
