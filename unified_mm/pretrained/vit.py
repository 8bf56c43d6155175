"""ViT (Dosovitskiy et al. 2021): an image tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.clip import stack_fields
from unified_mm.pretrained.family import Family, Fields, prefix
from unified_mm.pretrained.layers import blocks, line, norm, tower_options
from unified_mm.pretrained.preprocessing import Preprocessing, image_fields
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Entry, Table, first_and_grid, patches, reshaped

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
BLOCK = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "output": "attention.output.dense",
    "attention_norm": "layernorm_before",
    "feed_forward_norm": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def fields(source: Source) -> Fields:
    """Returns the fields of two towers, of which ViT is the image's, pooled at its class token."""
    c = Section(source.config.where, source.config, DEFAULTS)
    c.refuse_unless("num_channels", 3, why="pictures have three colours here")
    usual = Preprocessing("squash", resampling="bilinear")
    data, embedding = image_fields(source, c["image_size"], usual)
    image = {
        "patch": c["patch_size"],
        "class_token": True,
        "modality_embedding": False,
        **embedding,
    }
    return {
        "data": data,
        "model": {
            "fusion": "late",
            "tower": {**stack_fields(c), "query_bias": bool(c["qkv_bias"])},
            "modalities": {"image": image, "text": {}},
        },
        "objectives": {"contrastive": {"weight": 1.0, "pool": "first"}},
    }


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of ViT's weights without a classifier."""
    model = config["model"]
    o, patch = tower_options(model), model["modalities"]["image"]["patch"]
    side = config["data"]["image_size"] // patch
    before = prefix(names, "vit.", probe="embeddings.cls_token")
    embeddings = f"{before}embeddings"
    entries = [
        line(
            f"{embeddings}.cls_token",
            "embedders_image/class_token",
            reshaped((1, 1, o.width), (o.width,)),
        ),
        line(
            f"{embeddings}.patch_embeddings.projection.weight",
            "embedders_image/patches/kernel",
            patches(patch),
        ),
        line(f"{embeddings}.patch_embeddings.projection.bias", "embedders_image/patches/bias"),
        Entry(
            (f"{embeddings}.position_embeddings",),
            ("embedders_image/class_position", "embedders_image/positions"),
            first_and_grid(side, leading=(1,)),
        ),
        *blocks(f"{before}encoder.layer.{{layer}}", "towers_image", BLOCK, o),
        *norm(f"{before}layernorm", "towers_image/norm"),
    ]
    ignored = {
        r"classifier\.(weight|bias)": "the classifier: an image tower has none",
        r"(vit\.)?pooler\.dense\.(weight|bias)": "the pooler after the class token",
        r"(vit\.)?embeddings\.mask_token": "the token of masked patches",
    }
    return Table(entries, ignored)


VIT = Family(name="ViT", types=("vit",), part="image", fields=fields, table=table, tokens=None)
