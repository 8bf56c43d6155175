"""ViT (Dosovitskiy et al. 2021): an image tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.family import Family, prefix
from unified_mm.pretrained.fields import STACK, Fields, read, usual
from unified_mm.pretrained.layers import blocks, norm, patches, projections, tower_options
from unified_mm.pretrained.preprocessing import Preprocessing, image_fields
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table

KEYS = usual(STACK, norm_epsilon=1e-12)
BLOCK = {
    **projections("attention.attention.{name}", "attention.output.dense"),
    "attention_norm": "layernorm_before",
    "feed_forward_norm": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def fields(source: Source) -> Fields:
    """Returns the fields of two towers, of which ViT is the image's, pooled at its class token."""
    c = source.config
    data, embedding = image_fields(source, c, Preprocessing("squash", resampling="bilinear"))
    image = {
        "class_token": True,
        "modality_embedding": False,
        **embedding,
    }
    return {
        "data": data,
        "model": {
            "fusion": "late",
            "tower": {**read(c, KEYS), "query_bias": bool(c.get("qkv_bias", True))},
            "modalities": {"image": image, "text": {}},
        },
        "objectives": {"contrastive": {"weight": 1.0, "pool": "first"}},
    }


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of ViT's weights without a classifier."""
    options = tower_options(config["model"])
    before = prefix(names, "vit.", probe="embeddings.cls_token")
    embeddings = f"{before}embeddings"
    entries = [
        *patches(
            config,
            f"{embeddings}.patch_embeddings.projection",
            f"{embeddings}.position_embeddings",
            f"{embeddings}.cls_token",
            batch="1 ",
        ),
        *blocks(f"{before}encoder.layer.{{layer}}", "towers_image", BLOCK, options),
        *norm(f"{before}layernorm", "towers_image/norm"),
    ]
    ignored = {
        r"classifier\.(weight|bias)": "the classifier: an image tower has none",
        r"(vit\.)?pooler\.dense\.(weight|bias)": "the pooler after the class token",
        r"(vit\.)?embeddings\.mask_token": "the token of masked patches",
    }
    return Table(entries, ignored)


VIT = Family("ViT", ("vit",), "image", fields, table)
