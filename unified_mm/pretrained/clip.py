"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023; Tschannen et al. 2025): two towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.modalities.text import VOCABULARY_MULTIPLE
from unified_mm.pretrained.family import Export, Family, Fields, text_fields
from unified_mm.pretrained.gpt2 import theirs
from unified_mm.pretrained.layers import (
    CLIP_BLOCK,
    activation,
    blocks,
    dense,
    line,
    main_options,
    norm,
    tower_options,
)
from unified_mm.pretrained.preprocessing import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    Preprocessing,
    image_fields,
    written,
)
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import (
    SCALAR,
    Entry,
    Table,
    first_and_grid,
    grid,
    into_heads,
    out_of_heads,
    packed,
    padded_rows,
    patches,
    reshaped,
)
from unified_mm.pretrained.vocabularies import TokenLayout, clip_files, only_json

CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP_TEXT = CLIP_TEXT | {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
SIGLIP_VISION = CLIP_VISION | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
POSITION_IDS = {r"(.*\.)?embeddings\.position_ids": "the numbers 0, 1, 2 ..., not learned"}
CONTRAST = "heads_contrastive"


def stack_fields(c: Section) -> Fields:
    """Returns the size and kind of a stack from its section of config.json."""
    return {
        "width": c["hidden_size"],
        "layers": c["num_hidden_layers"],
        "heads": c["num_attention_heads"],
        "feed_forward": c["intermediate_size"],
        "norm_epsilon": c["layer_norm_eps"],
        "activation": activation(c, "hidden_act"),
    }


def _two_towers(
    source: Source, text: Section, vision: Section, usual: Preprocessing, **image: Any
) -> Fields:
    vision.refuse_unless("num_channels", 3, why="pictures have three colours here")
    data, embedding = image_fields(source, vision["image_size"], usual)
    length = text["max_position_embeddings"]
    return {
        "data": data,
        "model": {
            "fusion": "late",
            **stack_fields(text),
            "tower": stack_fields(vision),
            "modalities": {
                "image": {
                    "patch": vision["patch_size"],
                    "modality_embedding": False,
                    **embedding,
                    **image,
                },
                "text": text_fields(
                    length=length, max_positions=length, vocabulary=text["vocab_size"]
                ),
            },
        },
    }


def clip_fields(source: Source) -> Fields:
    """Returns the fields of CLIP's two towers.

    Text is causal and pooled at its end token; images are pooled at a class token.
    """
    text = source.config.section("text_config", CLIP_TEXT)
    vision = source.config.section("vision_config", CLIP_VISION)
    usual = Preprocessing("crop_resized", mean=CLIP_MEAN, std=CLIP_DEVIATION)
    fields = _two_towers(
        source,
        text,
        vision,
        usual,
        bias=False,
        class_token=True,
        norm=True,
        norm_epsilon=vision["layer_norm_eps"],
    )
    contrast = {
        "weight": 1.0,
        "rule": "separate_causal",
        "loss": "softmax",
        "width": source.config.get("projection_dim", 512),
        "pool": "first",
        "text_pool": "last",
        "projection": "linear",
        "text_projection": "linear",
    }
    return fields | {"objectives": {"contrastive": contrast}}


def clip_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of CLIP's weights: two towers, their embeddings and projections."""
    entries = [
        *_text(config, "text_model.final_layer_norm"),
        *class_token_patches("vision_model", config),
        *norm("vision_model.pre_layrnorm", "embedders_image/norm"),
        *_vision_stack(config, "vision_model"),
        *norm("vision_model.post_layernorm", "towers_image/norm"),
        *dense("visual_projection", f"{CONTRAST}/project_image", False),
        *dense("text_projection", f"{CONTRAST}/project_text", False),
        line("logit_scale", f"{CONTRAST}/log_scale"),
    ]
    return Table(entries, POSITION_IDS)


def _text(config: Mapping[str, Any], final_norm: str) -> list[Entry]:
    text = config["model"]["modalities"]["text"]
    rows = padded_rows(text["vocabulary"], multiple=VOCABULARY_MULTIPLE)
    before = "text_model.embeddings"
    return [
        line(f"{before}.token_embedding.weight", "embedders_text/tokens", rows),
        line(f"{before}.position_embedding.weight", "embedders_text/positions"),
        *blocks(
            "text_model.encoder.layers.{layer}",
            "transformer",
            CLIP_BLOCK,
            main_options(config["model"]),
        ),
        *norm(final_norm, "transformer/norm"),
    ]


def class_token_patches(theirs: str, config: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of CLIP's image embeddings: class token, patches and positions."""
    image = config["model"]["modalities"]["image"]
    side = config["data"]["image_size"] // image["patch"]
    before = f"{theirs}.embeddings"
    return [
        line(f"{before}.class_embedding", "embedders_image/class_token"),
        line(
            f"{before}.patch_embedding.weight",
            "embedders_image/patches/kernel",
            patches(image["patch"]),
        ),
        Entry(
            (f"{before}.position_embedding.weight",),
            ("embedders_image/class_position", "embedders_image/positions"),
            first_and_grid(side),
        ),
    ]


def _vision_stack(config: Mapping[str, Any], theirs: str) -> list[Entry]:
    options = tower_options(config["model"])
    return blocks(f"{theirs}.encoder.layers.{{layer}}", "towers_image", CLIP_BLOCK, options)


def siglip_fields(source: Source) -> Fields:
    """Returns the fields of SigLIP's two towers.

    Text is bidirectional and pooled at its last position, padding or not; images are pooled by
    attention.
    """
    text = source.config.section("text_config", SIGLIP_TEXT)
    vision = source.config.section("vision_config", SIGLIP_VISION)
    vision.refuse_unless("vision_use_head", True, why="pictures are pooled by attention here")
    for key, value in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-6)):
        vision.refuse_unless(key, value, why=f"the pooling of pictures has {value} here")
    width = text["projection_size"] or text["hidden_size"]
    if width != vision["hidden_size"]:
        raise ValueError(
            f"{text.where}: projection_size={width} is not the {vision['hidden_size']} of pictures"
        )
    fields = _two_towers(source, text, vision, Preprocessing("squash"))
    fields["model"]["modalities"]["text"]["attend_padding"] = True
    contrast = {
        "weight": 1.0,
        "rule": "separate",
        "loss": "sigmoid",
        "width": width,
        "pool": "attention",
        "pool_heads": vision["num_attention_heads"],
        "pool_feed_forward": vision["intermediate_size"],
        "projection": "none",
        "text_pool": "last",
        "text_projection": "affine",
        "bound_scale": False,
    }
    return fields | {"objectives": {"contrastive": contrast}}


def siglip_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of SigLIP's weights: no class token, and a pooling with parameters."""
    image = config["model"]["modalities"]["image"]
    side = config["data"]["image_size"] // image["patch"]
    before = "vision_model.embeddings"
    entries = [
        *_text(config, "text_model.final_layer_norm"),
        line(
            f"{before}.patch_embedding.weight",
            "embedders_image/patches/kernel",
            patches(image["patch"]),
        ),
        line(f"{before}.patch_embedding.bias", "embedders_image/patches/bias"),
        line(f"{before}.position_embedding.weight", "embedders_image/positions", grid(side)),
        *_vision_stack(config, "vision_model"),
        *norm("vision_model.post_layernorm", "towers_image/norm"),
        *_pooling(config),
        *dense("text_model.head", f"{CONTRAST}/project_text", True),
        line("logit_scale", f"{CONTRAST}/log_scale", SCALAR),
        line("logit_bias", f"{CONTRAST}/bias", SCALAR),
    ]
    return Table(entries, POSITION_IDS)


def _pooling(config: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of the attention pooling.

    In torch's attention one tensor holds queries, keys and values, stacked along its first axis.
    """
    heads = config["objectives"]["contrastive"]["pool_heads"]
    width = tower_options(config["model"]).width
    theirs, ours = "vision_model.head", f"{CONTRAST}/attend_image"
    three = [f"{ours}/{name}" for name in ("query", "key", "value")]
    kernels = packed(3, 0, into_heads(heads, width // heads))
    biases = packed(3, 0, reshaped((width,), (heads, width // heads)))
    return [
        line(f"{theirs}.probe", f"{ours}/query_token", reshaped((1, 1, width), (1, width))),
        Entry(
            (f"{theirs}.attention.in_proj_weight",), tuple(f"{p}/kernel" for p in three), kernels
        ),
        Entry((f"{theirs}.attention.in_proj_bias",), tuple(f"{p}/bias" for p in three), biases),
        line(
            f"{theirs}.attention.out_proj.weight",
            f"{ours}/output/kernel",
            out_of_heads(heads, width // heads),
        ),
        line(f"{theirs}.attention.out_proj.bias", f"{ours}/output/bias"),
        *norm(f"{theirs}.layernorm", f"{ours}/norm"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/feed_forward/up", True),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/feed_forward/down", True),
    ]


def their_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a CLIP run."""
    m = config["model"]
    image, text = m["modalities"]["image"], m["modalities"]["text"]
    width = config["objectives"]["contrastive"]["width"]
    if tokenizer.eos_id == 2:
        raise ValueError(
            "its end token has id 2, which readers of CLIP take to mean the highest id there is"
        )

    def stack(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": fields["width"],
            "intermediate_size": fields["feed_forward"],
            "num_hidden_layers": fields["layers"],
            "num_attention_heads": fields["heads"],
            "hidden_act": theirs(fields["activation"], "quick_gelu"),
            "layer_norm_eps": fields["norm_epsilon"],
            "projection_dim": width,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "text_config": {
            "model_type": "clip_text_model",
            **stack(m),
            "vocab_size": text["vocabulary"],
            "max_position_embeddings": text["max_positions"],
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **stack(m["tower"]),
            "image_size": config["data"]["image_size"],
            "patch_size": image["patch"],
            "num_channels": 3,
        },
        "dtype": "float32",
    }


CLIP = Family(
    name="CLIP",
    types=("clip",),
    part="both",
    fields=clip_fields,
    table=clip_table,
    tokens=TokenLayout(
        clip_files,
        defaults={"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        eos_when_cut=True,
    ),
    export=Export(
        their_config,
        ("model", "objectives.contrastive", "data.image_size"),
        lambda config: {"preprocessor_config.json": written(config)},
    ),
)
SIGLIP = Family(
    name="SigLIP",
    types=("siglip",),
    part="both",
    fields=siglip_fields,
    table=siglip_table,
    tokens=TokenLayout(
        only_json, begins=False, defaults={"eos": "</s>", "pad": "</s>"}, eos_when_cut=True
    ),
)
