"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023; Tschannen et al. 2025): two towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.pretrained.family import Export, Family, token_ids
from unified_mm.pretrained.fields import STACK, Fields, read, text_fields, usual, written
from unified_mm.pretrained.layers import (
    CLIP_BLOCK,
    POSITION_IDS,
    attention,
    blocks,
    clip_tower,
    dense,
    line,
    main_options,
    norm,
    projections,
    tower_options,
    vocabulary,
)
from unified_mm.pretrained.preprocessing import (
    CLIP_DEVIATION,
    CLIP_MEAN,
    Preprocessing,
    image_fields,
    preprocessor_config,
)
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import SCALAR, Entry, Table, rearranged
from unified_mm.pretrained.vocabularies import TokenLayout, clip_files, lower_gemma, only_json

TEXT = {"vocabulary": ("vocab_size", 49408), "max_positions": ("max_position_embeddings", 77)}
CLIP_VISION = usual(STACK, activation="quick_gelu")
CLIP_TEXT = usual(CLIP_VISION, width=512, heads=8, feed_forward=2048)
SIGLIP_STACK = usual(STACK, activation="gelu_pytorch_tanh", norm_epsilon=1e-6)
SIGLIP_TEXT = usual(TEXT, vocabulary=32000, max_positions=64)
CONTRAST = "heads_contrastive"
CLIP_PICTURES = Preprocessing("crop_resized", mean=CLIP_MEAN, std=CLIP_DEVIATION, patch=32)
END = 49407  # of a text, where config.json names no other
HIGHEST = 2  # where it says that this is the end, its readers take the highest id of a text


def tower_image(tower: Fields) -> Fields:
    """Returns the fields of the images of CLIP's tower: a class token, and a norm before it."""
    return {
        "modality_embedding": False,
        "bias": False,
        "class_token": True,
        "norm": True,
        "norm_epsilon": tower["norm_epsilon"],
    }


def beside_llama(tower: Fields) -> Fields:
    """Returns the fields of CLIP's tower in a model whose main stack is a Llama."""
    return {
        **tower,
        "norm": "layer",
        "final_norm": False,
        "gated_feed_forward": False,
        "query_bias": True,
        "output_bias": True,
        "feed_forward_bias": True,
        "query_key_norm": False,
        "key_value_heads": tower["heads"],
        "head_width": tower["width"] // tower["heads"],
        "rotary_base": 0.0,
        "window": 0,
    }


def _two_towers(
    source: Source, main: Fields, tower: Fields, text: Fields, image: Fields, kind: Preprocessing
) -> Fields:
    data, embedding = image_fields(source, of_tower(source.config, "vision"), kind)
    texts = text_fields(length=text["max_positions"], **text)
    return {
        "data": data,
        "model": {
            "fusion": "late",
            **main,
            "tower": tower,
            "modalities": {"image": image | embedding, "text": texts},
        },
    }


def of_tower(c: Section, tower: str) -> Section:
    """Returns what config.json says of a tower, 'text' or 'vision'.

    The older of two keys that may hold it decides where both are there, as in their library.
    """
    older = f"{tower}_config_dict"
    return c.section(f"{tower}_config" if c.get(older) is None else older)


def clip_fields(source: Source) -> Fields:
    """Returns the fields of CLIP's two towers.

    Text is causal and pooled at its end token; images are pooled at a class token.
    """
    c, vision = of_tower(source.config, "text"), of_tower(source.config, "vision")
    tower = read(vision, CLIP_VISION)
    image = tower_image(tower)
    fields = _two_towers(source, read(c, CLIP_TEXT), tower, read(c, TEXT), image, CLIP_PICTURES)
    width = source.config.get("projection_dim", 512)
    return fields | {"objectives": {"contrastive": clip_contrast(width)}}


def clip_contrast(width: int) -> Fields:
    """Returns the fields of CLIP's contrast in a space of so many numbers."""
    return {
        "weight": 1.0,
        "rule": "separate_causal",
        "loss": "softmax",
        "width": width,
        "pool": "first",
        "text_pool": "last",
        "projection": "linear",
        "text_projection": "linear",
        "bound_scale": False,  # the scale is used as it is saved
    }


def refuse_other_end(source: Source, tokenizer: TextTokenizer) -> None:
    """Checks that texts are pooled at the token that the tokenizer puts at their end.

    Raises:
      ValueError: if config.json names another.
    """
    c = source.config
    c = of_tower(c, "text") if c.get("model_type") == "clip" else c  # or the text tower alone
    said = c.get("eos_token_id", END)
    end = tokenizer.vocabulary_size - 1 if said == HIGHEST else said
    if end != tokenizer.eos_id:
        raise ValueError(
            f"{c.where}: eos_token_id={said} pools texts at the token {end}, but the tokenizer "
            f"ends them with {tokenizer.eos_id} ({tokenizer.special_tokens['eos']}): their files "
            "are not of one model"
        )


def clip_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of CLIP's weights: two towers, their embeddings and projections."""
    entries = [
        *text_tower(config),
        *clip_tower(config, "vision_model."),
        *dense("visual_projection", f"{CONTRAST}/project_image", False),
        *dense("text_projection", f"{CONTRAST}/project_text", False),
        line("logit_scale", f"{CONTRAST}/log_scale"),
    ]
    return Table(entries, POSITION_IDS)


def text_tower(config: Mapping[str, Any], theirs: str = "text_model.") -> list[Entry]:
    """Returns the entries of the text tower of CLIP and of SigLIP, whose names begin so."""
    model, before = config["model"], f"{theirs}embeddings"
    return [
        *vocabulary(model, [f"{before}.token_embedding.weight"])[0],
        line(f"{before}.position_embedding.weight", "embedders_text/positions"),
        *blocks(
            f"{theirs}encoder.layers.{{layer}}", "transformer", CLIP_BLOCK, main_options(model)
        ),
        *norm(f"{theirs}final_layer_norm", "transformer/norm"),
    ]


def siglip_fields(source: Source) -> Fields:
    """Returns the fields of SigLIP's two towers.

    Text is bidirectional and pooled at its last position, padding or not; images are pooled by
    attention.
    """
    c, vision = source.config.section("text_config"), source.config.section("vision_config")
    vision.refuse_unless("vision_use_head", True, why="pictures are pooled by attention here")
    for name in ("activation", "norm_epsilon"):
        key, value = SIGLIP_STACK[name]
        vision.refuse_unless(key, value, why=f"the pooling of pictures has {value} here")
    main, tower = read(c, SIGLIP_STACK), read(vision, SIGLIP_STACK)
    width = c.get("projection_size") or main["width"]
    if width != tower["width"]:
        raise ValueError(
            f"{c.where}: projection_size={width} is not the {tower['width']} of pictures"
        )
    text, kind = read(c, SIGLIP_TEXT), Preprocessing("squash")
    fields = _two_towers(source, main, tower, text, {"modality_embedding": False}, kind)
    fields["model"]["modalities"]["text"]["attend_padding"] = True
    contrast = {
        "weight": 1.0,
        "rule": "separate",
        "loss": "sigmoid",
        "width": width,
        "pool": "attention",
        "pool_heads": tower["heads"],
        "pool_feed_forward": tower["feed_forward"],
        "projection": "none",
        "text_pool": "last",
        "text_projection": "affine",
        "bound_scale": False,
    }
    return fields | {"objectives": {"contrastive": contrast}}


def siglip_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of SigLIP's weights: no class token, and a pooling with parameters."""
    entries = [
        *text_tower(config),
        *clip_tower(config, "vision_model."),
        *_pooling(config),
        *dense("text_model.head", f"{CONTRAST}/project_text", True),
        line("logit_scale", f"{CONTRAST}/log_scale", SCALAR),
        line("logit_bias", f"{CONTRAST}/bias", SCALAR),
    ]
    return Table(entries, POSITION_IDS)


def _pooling(config: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of the attention pooling."""
    width = config["objectives"]["contrastive"]["width"]
    head_width = width // config["objectives"]["contrastive"]["pool_heads"]
    theirs, ours = "vision_model.head", f"{CONTRAST}/attend_image"
    modules = {"packed": f"{theirs}.attention.in_proj_", "output": f"{theirs}.attention.out_proj"}
    paths = projections(f"{ours}/{{name}}", f"{ours}/output")
    return [
        line(f"{theirs}.probe", f"{ours}/query_token", rearranged("1 1 d", "1 d")),
        *attention(modules, paths, head_width, query_bias=True, output_bias=True),
        *norm(f"{theirs}.layernorm", f"{ours}/norm"),
        *dense(f"{theirs}.mlp.fc1", f"{ours}/feed_forward/up", True),
        *dense(f"{theirs}.mlp.fc2", f"{ours}/feed_forward/down", True),
    ]


def their_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a CLIP run."""
    width = {"projection_dim": config["objectives"]["contrastive"]["width"]}
    return {
        **width,
        "text_config": their_text(config, tokenizer) | width,
        "vision_config": their_vision(config) | width,
    }


def their_text(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns what config.json says of CLIP's text tower.

    Raises:
      ValueError: the tokenizer's end token would be taken for another.
    """
    if tokenizer.eos_id == HIGHEST:
        raise ValueError(
            "its end token has id 2, which readers of CLIP take to mean the highest id there is"
        )
    return {
        "model_type": "clip_text_model",
        **written(vars(main_options(config["model"])), STACK),
        **written(config["model"]["modalities"]["text"], TEXT),
        **token_ids(tokenizer),
        "pad_token_id": tokenizer.pad_id,
    }


def their_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what config.json says of CLIP's image tower."""
    return {
        "model_type": "clip_vision_model",
        **written(vars(tower_options(config["model"])), STACK),
        "image_size": config["data"]["image_size"],
        "patch_size": config["model"]["modalities"]["image"]["patch"],
        "num_channels": 3,
    }


def their_siglip_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a SigLIP run."""
    model = config["model"]
    image, text = model["modalities"]["image"], model["modalities"]["text"]
    return {
        "text_config": {
            "model_type": "siglip_text_model",
            **written(vars(main_options(model)), SIGLIP_STACK),
            **written(text, SIGLIP_TEXT),
            "projection_size": config["objectives"]["contrastive"]["width"],
            **token_ids(tokenizer),
            "pad_token_id": tokenizer.pad_id,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **written(vars(tower_options(model)), SIGLIP_STACK),
            "image_size": config["data"]["image_size"],
            "patch_size": image["patch"],
            "num_channels": 3,
        },
    }


def preprocessing_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the further files of a family that reads pictures."""
    return {"preprocessor_config.json": preprocessor_config(config)}


CLIP_TOKENS = TokenLayout(
    clip_files,
    defaults={"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    eos_when_cut=True,
    check=refuse_other_end,
)
COMPARED = ("model", "objectives.contrastive", "data.image_size")
CLIP = Family(
    name="CLIP",
    types=("clip",),
    part="both",
    fields=clip_fields,
    table=clip_table,
    tokens=CLIP_TOKENS,
    export=Export(
        "CLIPModel",
        their_config,
        COMPARED,
        preprocessing_files,
    ),
)
SIGLIP = Family(
    name="SigLIP",
    types=("siglip",),
    part="both",
    fields=siglip_fields,
    table=siglip_table,
    tokens=TokenLayout(
        only_json,
        begins=False,
        defaults={"eos": "</s>", "pad": "</s>"},
        eos_when_cut=True,
        adapt=lower_gemma,
    ),
    export=Export("SiglipModel", their_siglip_config, COMPARED, preprocessing_files),
)
