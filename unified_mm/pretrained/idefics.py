"""IDEFICS 1 (Laurençon et al. 2023, "OBELICS"): an open Flamingo built on Llama and CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unified_mm.modalities.text import VOCABULARY_MULTIPLE
from unified_mm.pretrained.clip import POSITION_IDS, class_token_patches
from unified_mm.pretrained.family import Family, Fields, text_fields
from unified_mm.pretrained.gpt2 import LONGEST
from unified_mm.pretrained.layers import (
    CLIP_BLOCK,
    LLAMA_BLOCK,
    PROJECTIONS,
    activation,
    attention,
    blocks,
    dense,
    line,
    main_options,
    norm,
    tower_options,
)
from unified_mm.pretrained.llama import ROTARY_BUFFERS, refuse_windows, rotary_base
from unified_mm.pretrained.preprocessing import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    Preprocessing,
    image_fields,
)
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import (
    Entry,
    Table,
    into_heads,
    out_of_heads,
    padded_rows,
    repeated,
    reshaped,
)
from unified_mm.pretrained.vocabularies import TokenLayout, only_json

DEFAULTS = {
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "alpha_type": "float",
    "use_resampler": False,
}
VISION = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
PERCEIVER = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}
GATE_SHAPES = {"float": "scalar", "vector": "channel"}
CROSS_MODULES = {
    "query": "cross_attn.q_proj",
    "key": "cross_attn.k_proj",
    "value": "cross_attn.v_proj",
    "output": "cross_attn.o_proj",
}


def fields(source: Source) -> Fields:
    """Returns the fields of a Llama with gated cross-attention and CLIP's image tower.

    A Perceiver resampler is between the two where config.json has one.
    """
    c = Section(source.config.where, source.config, DEFAULTS)
    vision = c.section("vision_config", VISION)
    refuse_windows(c)
    vision.refuse_unless("num_channels", 3, why="pictures have three colours here")
    c.refuse_unless("alpha_type", *GATE_SHAPES, why="gates are numbers or vectors here")
    if c["num_hidden_layers"] % c["cross_layer_interval"]:
        raise ValueError(
            f"{c.where}: num_hidden_layers={c['num_hidden_layers']} is no multiple of "
            f"cross_layer_interval={c['cross_layer_interval']}, as it has to be here"
        )
    usual = Preprocessing("squash", mean=CLIP_MEAN, std=CLIP_DEVIATION)
    data, embedding = image_fields(source, vision["image_size"], usual)
    image = {
        "patch": vision["patch_size"],
        "bias": False,
        "class_token": True,
        "modality_embedding": False,
        "norm": True,
        "norm_epsilon": vision["layer_norm_eps"],
        **embedding,
    }
    text = text_fields(
        length=min(c["max_position_embeddings"], LONGEST),
        max_positions=c["max_position_embeddings"],
        learned_positions=False,
        vocabulary=c["vocab_size"] + c["additional_vocab_size"],
        head="tied" if c["tie_word_embeddings"] else "own",
    )
    return {
        "data": data,
        "model": {
            "fusion": "gated_cross_attention",
            **_language_fields(c),
            "tower": _tower_fields(vision),
            "cross": {
                "every": c["cross_layer_interval"],
                "gate": "tanh",
                "shape": GATE_SHAPES[c["alpha_type"]],
                "query_key_norm": bool(c["qk_layer_norms"]),
            },
            "resampler": _resampler_fields(c, vision["embed_dim"]),
            "modalities": {"image": image, "text": text},
        },
        "objectives": {"captioning": {"weight": 1.0, "rule": "interleaved_latest"}},
    }


def _language_fields(c: Section) -> Fields:
    return {
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "feed_forward": c["intermediate_size"],
        "norm": "rms",
        "norm_epsilon": c["rms_norm_eps"],
        "activation": activation(c, "hidden_act"),
        "gated_feed_forward": True,
        "query_bias": False,
        "output_bias": False,
        "feed_forward_bias": False,
        "rotary_base": rotary_base(c),
    }


def _tower_fields(vision: Section) -> Fields:
    return {
        "width": vision["embed_dim"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "feed_forward": vision["intermediate_size"],
        "norm": "layer",
        "norm_epsilon": vision["layer_norm_eps"],
        "final_norm": False,
        "activation": activation(vision, "hidden_act"),
        "gated_feed_forward": False,
        "query_bias": True,
        "output_bias": True,
        "feed_forward_bias": True,
        "rotary_base": 0.0,
    }


def _resampler_fields(c: Section, width: int) -> Fields:
    if not c["use_resampler"]:
        return {"latents": 0}
    p = c.section("perceiver_config", PERCEIVER)
    return {
        "latents": p["resampler_n_latents"],
        "layers": p["resampler_depth"],
        "heads": p["resampler_n_heads"],
        "head_width": p["resampler_head_dim"],
        "feed_forward": 4 * width,
        "activation": "relu",
        "frames": 0,
        "query_key_norm": bool(p["qk_layer_norms_perceiver"]),
        "head_norm": "layer",
    }


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of IDEFICS's weights.

    The token embeddings that it adds to Llama's become rows below them.
    """
    model = config["model"]
    tables, added = ["model.embed_tokens.weight"], "model.embed_tokens.additional_embedding.weight"
    scores, added_scores = ["lm_head.weight"], "lm_head.additional_fc.weight"
    if added in names:
        tables, scores = [*tables, added], [*scores, added_scores]
    rows = padded_rows(model["modalities"]["text"]["vocabulary"], multiple=VOCABULARY_MULTIPLE)
    entries = [
        Entry(tuple(tables), ("embedders_text/tokens",), rows),
        *blocks("model.layers.{layer}", "transformer", LLAMA_BLOCK, main_options(model)),
        *norm("model.norm", "transformer/norm", "rms"),
        *_cross(model),
        *class_token_patches("model.vision_model", config),
        *norm("model.vision_model.pre_layrnorm", "embedders_image/norm"),
        *blocks(
            "model.vision_model.encoder.layers.{layer}",
            "towers_image",
            CLIP_BLOCK,
            tower_options(model),
        ),
        *_resampler(model["resampler"]),
    ]
    copies = {}
    if model["modalities"]["text"]["head"] == "own":
        entries.append(Entry(tuple(scores), ("embedders_text/scores",), rows))
    else:
        copies = dict(zip(scores, tables, strict=True))
    ignored = {
        **POSITION_IDS,
        **ROTARY_BUFFERS,
        r"model\.vision_model\.post_layernorm\.(weight|bias)": (
            "of a pooled vector that the language model does not look at"
        ),
    }
    return Table(entries, ignored, copies)


def _cross(model: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of the gated cross-attention layers, whose projections have no bias."""
    o = main_options(model)
    channel = o.cross.shape == "channel"
    gate = reshaped((1, 1, o.width), (o.width,)) if channel else reshaped((1,), (1,))
    ours = {name: f"attention/{name}" for name in PROJECTIONS}
    bare = replace(o, query_bias=False, output_bias=False)
    layer = [
        *attention(CROSS_MODULES, ours, bare),
        *norm("input_layernorm", "attention_norm", o.norm),
        *norm("post_attention_layernorm", "feed_forward_norm", o.norm),
        line("alpha_cross_attn", "attention_gate", gate),
        line("alpha_dense", "feed_forward_gate", gate),
    ]
    for name in ("gate", "up", "down"):
        layer += dense(f"mlp.{name}_proj", f"feed_forward/{name}", False)
    if o.cross.query_key_norm:
        layer += norm("cross_attn.q_layer_norm", "attention/query_norm", "rms")
        layer += norm("cross_attn.k_layer_norm", "attention/key_norm", "rms")
    return repeated(
        layer, "model.gated_cross_attn_layers.{layer}", "transformer/layers/cross", o.periods
    )


def _resampler(fields: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of the resampler, whose blocks each have parameters of their own."""
    if not fields["latents"]:
        return []
    theirs, ours = "model.perceiver_resampler", "resamplers_image"
    heads, width = fields["heads"], fields["head_width"]
    at, after = "attention_{layer}", "feed_forward"
    block = [
        line("0.q_proj.weight", f"{at}/query/kernel", into_heads(heads, width)),
        line("0.k_proj.weight", f"{at}/key/kernel", into_heads(heads, width)),
        line("0.v_proj.weight", f"{at}/value/kernel", into_heads(heads, width)),
        line("0.output_proj.weight", f"{at}/output/kernel", out_of_heads(heads, width)),
        *norm("0.context_layer_norm", f"{at}/features_norm"),
        *norm("0.latents_layer_norm", f"{at}/latents_norm"),
        *norm("1.ln", f"{after}_norm_{{layer}}"),
        *dense("1.fc", f"{after}_{{layer}}/up", False),
        *dense("1.c_proj", f"{after}_{{layer}}/down", False),
    ]
    if fields["query_key_norm"]:
        block += norm("0.q_layer_norm", f"{at}/query_norm")
        block += norm("0.k_layer_norm", f"{at}/key_norm")
    return [
        line(f"{theirs}.latents", f"{ours}/latents"),
        *repeated(block, f"{theirs}.blocks.{{layer}}", ours, fields["layers"], blocks=0),
        *norm(f"{theirs}.layer_norm", f"{ours}/norm"),
    ]


IDEFICS = Family(
    name="IDEFICS",
    types=("idefics",),
    part="both",
    fields=fields,
    table=table,
    tokens=TokenLayout(only_json, defaults={"bos": "<s>", "eos": "</s>"}),
)
