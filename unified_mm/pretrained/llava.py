"""LLaVA (Liu et al. 2023, "Visual instruction tuning"): a CLIP tower, a projector, a Llama."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained import llama
from unified_mm.pretrained.clip import CLIP_PICTURES, CLIP_VISION, beside_llama, tower_image
from unified_mm.pretrained.family import Family
from unified_mm.pretrained.fields import Fields, read
from unified_mm.pretrained.layers import POSITION_IDS, clip_tower, dense
from unified_mm.pretrained.preprocessing import image_fields
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Table
from unified_mm.pretrained.vocabularies import TokenLayout, gpt2_files

# By the type of its language model.
LANGUAGE = {
    "llama": llama.fields,
    "mistral": llama.mistral_fields,
    "qwen2": llama.qwen2_fields,
    "qwen3": llama.qwen3_fields,
}
PROJECTOR = {
    "activation": ("projector_hidden_act", "gelu"),
    "bias": ("multimodal_projector_bias", True),
}
PICTURE = 32000  # the token that stands for it, where config.json names no other


def fields(source: Source) -> Fields:
    """Returns the fields of early fusion of CLIP's features in a language model.

    The tower ends where its features are taken, by default before its last layer.
    """
    c = source.config
    vision, text = c.section("vision_config"), c.section("text_config")
    vision.refuse_unless("model_type", "clip_vision_model", why="the image tower is CLIP's here")
    if text.get("model_type", "llama") not in LANGUAGE:
        text.refuse_unless("model_type", why=f"its language model is {', '.join(LANGUAGE)} here")
    tied = {"tie_word_embeddings": any(x.get("tie_word_embeddings") for x in (c, text))}
    found = LANGUAGE[text.get("model_type", "llama")](Section(text.where, text | tied))
    tower = beside_llama(read(vision, CLIP_VISION))
    tower["layers"] = _layers(c, tower["layers"])
    data, embedding = image_fields(source, vision, CLIP_PICTURES)
    c.refuse_unless("vision_feature_select_strategy", "default", "full", why="what it keeps")
    whole = c.get("vision_feature_select_strategy") == "full"
    model = found["model"]
    return {
        "data": data,
        "model": {
            **model,
            "fusion": "early_features",
            "tower": tower,
            "projector": {"skip": 0 if whole else 1, **read(c, PROJECTOR)},
            "modalities": {"image": tower_image(tower) | embedding, **model["modalities"]},
        },
        "objectives": {"captioning": {"weight": 1.0, "rule": "in_order"}},
    }


def _layers(c: Section, layers: int) -> int:
    """Returns how many layers of the tower its features come through.

    Raises:
      ValueError: several layers are joined, or there is no such layer.
    """
    said = c.get("vision_feature_layer", -2)
    if not isinstance(said, int):
        c.refuse_unless("vision_feature_layer", why="the features of one layer are read here")
    found = said if said >= 0 else layers + 1 + said  # their first state is before all layers
    if not 1 <= found <= layers:
        c.refuse_unless("vision_feature_layer", why=f"the tower has layers 1 to {layers}")
    return int(found)


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of LLaVA's weights, under the names of any version of transformers."""
    outer = "model." if any(name.startswith("model.") for name in names) else ""
    model, scores = ("language_model.model.", "language_model.lm_head.weight")
    if outer:
        model, scores = "model.language_model.", "lm_head.weight"
    tower = f"{outer}vision_tower."
    if any(name.startswith(f"{tower}vision_model.") for name in names):
        tower += "vision_model."
    language = llama.language_table(config["model"], model, scores)
    entries = [*language.entries, *clip_tower(config, tower)]
    bias = config["model"]["projector"]["bias"]
    for theirs, ours in (("linear_1", "up"), ("linear_2", "down")):
        entries += dense(f"{outer}multi_modal_projector.{theirs}", f"projectors_image/{ours}", bias)

    layers = config["model"]["tower"]["layers"]
    beyond = "of the tower, beyond the layer that features are taken from"
    ignored = {
        **POSITION_IDS,
        **language.ignored,
        **{re.escape(name): beyond for name in names if _layer(name, tower) >= layers},
        rf"{re.escape(tower)}post_layernorm\.(weight|bias)": beyond,
    }
    return Table(entries, ignored, language.copies)


def _layer(name: str, tower: str) -> int:
    """Returns the number of the tower's layer that a tensor is of, -1 for none."""
    found = re.match(rf"{re.escape(tower)}encoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def picture_token(source: Source) -> int:
    """Returns the id of the token that stands for the picture in a text."""
    c = source.config
    return int(c.get("image_token_index", c.get("image_token_id", PICTURE)))


LLAVA = Family(
    name="LLaVA",
    types=("llava",),
    part="both",
    fields=fields,
    table=table,
    tokens=TokenLayout(gpt2_files, image=picture_token),
)
