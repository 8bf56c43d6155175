"""IDEFICS 1 (Laurençon et al. 2023, "OBELICS"): an open Flamingo built on Llama and CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.clip import beside_llama, tower_image
from unified_mm.pretrained.family import Family
from unified_mm.pretrained.fields import STACK, Fields, language_text, read, usual
from unified_mm.pretrained.layers import (
    LLAMA_BLOCK,
    POSITION_IDS,
    attention,
    blocks,
    clip_tower,
    dense,
    line,
    main_options,
    norm,
    projections,
    vocabulary,
)
from unified_mm.pretrained.llama import (
    ROTARY_BUFFERS,
    STACK_KEYS,
    TEXT,
    refuse_windows,
    stack_fields,
)
from unified_mm.pretrained.preprocessing import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    Preprocessing,
    image_fields,
)
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Entry, Table, rearranged, repeated
from unified_mm.pretrained.vocabularies import TokenLayout, only_json

VISION = {
    **usual(STACK, layers=32, heads=16, feed_forward=5120),
    "width": ("embed_dim", 768),
}
GATE_SHAPES = {"float": "scalar", "vector": "channel"}
CROSS_MODULES = projections("cross_attn.{letter}_proj", "cross_attn.o_proj")
RESAMPLER = {
    "latents": ("resampler_n_latents", 64),
    "layers": ("resampler_depth", 6),
    "heads": ("resampler_n_heads", 16),
    "head_width": ("resampler_head_dim", 96),
    "query_key_norm": ("qk_layer_norms_perceiver", False),
}


def fields(source: Source) -> Fields:
    """Returns the fields of a Llama with gated cross-attention and CLIP's image tower.

    A Perceiver resampler is between the two where config.json has one.
    """
    c = source.config
    vision = c.section("vision_config")
    refuse_windows(c)
    c.refuse_unless("alpha_type", *GATE_SHAPES, why="gates are numbers or vectors here")
    stack, tower = stack_fields(c, STACK_KEYS), beside_llama(read(vision, VISION))
    every = c.get("cross_layer_interval", 1)
    if stack["layers"] % every:
        raise ValueError(
            f"{c.where}: num_hidden_layers={stack['layers']} is no multiple of "
            f"cross_layer_interval={every}, as it has to be here"
        )
    kind = Preprocessing("squash", mean=CLIP_MEAN, std=CLIP_DEVIATION, patch=14)
    data, embedding = image_fields(source, vision, kind)
    image = tower_image(tower) | embedding
    text = language_text(c, TEXT, learned_positions=False)
    text["vocabulary"] += c.get("additional_vocab_size", 0)
    return {
        "data": data,
        "model": {
            "fusion": "gated_cross_attention",
            **stack,
            "tower": tower,
            "cross": {
                "every": every,
                "gate": "tanh",
                "shape": GATE_SHAPES[c.get("alpha_type", "float")],
                "query_key_norm": bool(c.get("qk_layer_norms", False)),
            },
            "resampler": _resampler_fields(c, tower["width"]),
            "modalities": {"image": image, "text": text},
        },
        "objectives": {"captioning": {"weight": 1.0, "rule": "interleaved_latest"}},
    }


def _resampler_fields(c: Section, width: int) -> Fields:
    if not c.get("use_resampler"):
        return {"latents": 0}
    return {
        **read(c.section("perceiver_config"), RESAMPLER),
        "feed_forward": 4 * width,
        "activation": "relu",
        "frames": 0,
        "head_norm": "layer",
    }


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of IDEFICS's weights.

    The token embeddings that it adds to Llama's become rows below them.
    """
    model = config["model"]
    tables, scores = ["model.embed_tokens.weight"], ["lm_head.weight"]
    added = "model.embed_tokens.additional_embedding.weight"
    if added in names:
        tables, scores = [*tables, added], [*scores, "lm_head.additional_fc.weight"]
    entries, copies = vocabulary(model, tables, scores)
    entries += [
        *blocks("model.layers.{layer}", "transformer", LLAMA_BLOCK, main_options(model)),
        *norm("model.norm", "transformer/norm", "rms"),
        *_cross(model),
        *clip_tower(config, "model.vision_model."),
        *_resampler(model["resampler"]),
    ]
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
    gate = rearranged("1 1 d" if channel else "1", "d" if channel else "1")
    ours = projections("attention/{name}", "attention/output")
    layer = [
        *attention(CROSS_MODULES, ours, o.head_dim),
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
    at, after = "attention_{layer}", "feed_forward"
    modules = projections("0.{letter}_proj", "0.output_proj")
    paths = projections("attention_{{layer}}/{name}", f"{at}/output")
    block = [
        *attention(modules, paths, fields["head_width"]),
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
