"""One of CLIP's two towers alone, as diffusion models and vision-language models take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.clip import (
    CLIP_PICTURES,
    CLIP_TEXT,
    CLIP_TOKENS,
    CLIP_VISION,
    CONTRAST,
    TEXT,
    preprocessing_files,
    text_tower,
    their_text,
    their_vision,
    tower_image,
)
from unified_mm.pretrained.family import Export, Family, prefix
from unified_mm.pretrained.fields import Fields, read, text_fields
from unified_mm.pretrained.layers import POSITION_IDS, clip_tower, dense, start_of_scale
from unified_mm.pretrained.preprocessing import image_fields
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table

PROJECTION = "text_projection"


def image_tower_fields(source: Source) -> Fields:
    """Returns the fields of two towers, of which CLIP's is the image's."""
    tower = read(source.config, CLIP_VISION)
    data, embedding = image_fields(source, source.config, CLIP_PICTURES)
    return {
        "data": data,
        "model": {
            "fusion": "late",
            "tower": tower,
            "modalities": {"image": tower_image(tower) | embedding, "text": {}},
        },
        "objectives": {"contrastive": {"weight": 1.0, "pool": "first"}},
    }


def image_tower_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of an image tower, without the projection to the space of two towers."""
    before = prefix(names, "vision_model.", probe="embeddings.class_embedding")
    projection = "the projection into a space that is shared with texts"
    ignored = {**POSITION_IDS, r"visual_projection\.weight": projection}
    return Table(clip_tower(config, before), ignored)


def text_tower_fields(source: Source) -> Fields:
    """Returns the fields of a causal text encoder, pooled at its end token and then projected."""
    c = source.config
    stack, text = read(c, CLIP_TEXT), read(c, TEXT)
    projected = f"{PROJECTION}.weight" in source.names
    contrast = {
        "weight": 1.0,
        "rule": "separate_causal",
        "between": "text",
        "width": c.get("projection_dim", 512) if projected else stack["width"],
        "text_pool": "last",
        "projection": "none",
        "text_projection": "linear" if projected else "none",
    }
    texts = text_fields(length=text["max_positions"], **text)
    return {
        "model": {"fusion": "late", **stack, "modalities": {"text": texts}},
        "objectives": {"contrastive": contrast},
    }


def text_tower_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of a text tower, and of its projection where there is one."""
    before = prefix(names, "text_model.", probe="embeddings.token_embedding.weight")
    entries = text_tower(config, before)
    if config["objectives"]["contrastive"]["text_projection"] == "linear":
        entries += dense(PROJECTION, f"{CONTRAST}/project_text", False)
    return Table(entries, POSITION_IDS, starts=start_of_scale())


def their_text_tower(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a text tower alone."""
    contrast = config["objectives"]["contrastive"]
    found = {**their_text(config, tokenizer), "projection_dim": contrast["width"]}
    if contrast["text_projection"] == "none":
        found["architectures"] = ["CLIPTextModel"]
    return found


CLIP_IMAGE_TOWER = Family(
    name="CLIP's image tower",
    types=("clip_vision_model",),
    part="image",
    fields=image_tower_fields,
    table=image_tower_table,
    export=Export(
        "CLIPVisionModel",
        lambda config, tokenizer: their_vision(config),
        ("model.tower", "model.modalities.image", "data.image_size"),
        preprocessing_files,
        part="image",
    ),
)
CLIP_TEXT_TOWER = Family(
    name="CLIP's text tower",
    types=("clip_text_model",),
    part="text",
    fields=text_tower_fields,
    table=text_tower_table,
    tokens=CLIP_TOKENS,
    export=Export(
        "CLIPTextModelWithProjection",
        their_text_tower,
        ("model", *(f"objectives.contrastive.{name}" for name in ("rule", "text_pool"))),
        part="text",
    ),
)
