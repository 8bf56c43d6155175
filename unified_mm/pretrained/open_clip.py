"""CLIP as open_clip keeps it (Cherti et al. 2023): its own ViTs and text towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.pretrained.clip import CLIP_TOKENS, CONTRAST, clip_contrast, tower_image
from unified_mm.pretrained.family import Family
from unified_mm.pretrained.fields import Fields, text_fields
from unified_mm.pretrained.layers import (
    blocks,
    line,
    main_options,
    norm,
    patches,
    tower_options,
    vocabulary,
)
from unified_mm.pretrained.preprocessing import CLIP_DEVIATION, CLIP_MEAN
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Table
from unified_mm.pretrained.vocabularies import TokenLayout, clip_files

BLOCK = {
    "packed": "attn.in_proj_",
    "output": "attn.out_proj",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
EPSILON = 1e-5
# What is read of each section, or changes no embedding; all else has to be as where it is not said.
MODEL = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale")
VISION = (
    ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size")
    + ("patch_dropout", "final_ln_after_pool")  # in training alone; the same for one token
)
TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
USUAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}
PREPROCESSED = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
FITS = {"shortest": "crop_resized", "squash": "squash"}


def fields(source: Source) -> Fields:
    """Returns the fields of two towers, as CLIP's.

    Raises:
      ValueError: if a tower is of another make (timm, a ResNet, a model of Hugging Face) or an
        option has no place here; the message names it.
    """
    model = source.config.section("model_cfg")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for section, names in ((model, MODEL), (vision, VISION), (text, TEXT)):
        _refuse_others(section, names)
    if not isinstance(vision.get("layers", 12), int):
        vision.refuse_unless("layers", why="a ResNet is none of the towers that are read here")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu_exact"
    tower = _stack(vision, 768, activation)
    tower["heads"] = tower["width"] // vision.get("head_width", 64)
    main = _stack(text, 512, activation)
    main["heads"] = text.get("heads", 8)
    length = text.get("context_length", 77)
    data, embedding = _pictures(source, vision)
    texts = text_fields(
        length=length, max_positions=length, vocabulary=text.get("vocab_size", 49408)
    )
    return {
        "data": data,
        "model": {
            "fusion": "late",
            **main,
            "tower": tower,
            "modalities": {"image": tower_image(tower) | embedding, "text": texts},
        },
        "objectives": {"contrastive": clip_contrast(model.get("embed_dim", 512))},
    }


def _stack(section: Section, width: int, activation: str) -> Fields:
    width = section.get("width", width)
    return {
        "width": width,
        "layers": section.get("layers", 12),
        "feed_forward": int(width * section.get("mlp_ratio", 4.0)),
        "norm_epsilon": EPSILON,
        "activation": activation,
    }


def _refuse_others(section: Section, names: tuple[str, ...]) -> None:
    for key, value in section.items():
        if key not in names and value and value not in USUAL.get(key, ()):
            section.refuse_unless(key, why="open_clip's own ViTs and text towers are read, as CLIP")


def _pictures(source: Source, vision: Section) -> tuple[Fields, Fields]:
    """Returns the fields of `config.data` and of the image modality."""
    said = source.config.section("preprocess_cfg")
    _refuse_others(said, PREPROCESSED)
    said.refuse_unless("interpolation", "bicubic", "bilinear", why="pictures are resized so here")
    said.refuse_unless("resize_mode", *FITS, why=f"pictures become squares by {', '.join(FITS)}")
    said.refuse_unless("mode", "RGB", why="pictures have three colours here")
    sizes = [vision.get("image_size", 224), said.get("size", vision.get("image_size", 224))]
    sides = {side for size in sizes for side in (size if isinstance(size, list) else [size])}
    if len(sides) > 1:
        raise ValueError(f"{said.where}: pictures of {sizes} pixels are no squares of one size")
    (size,) = sides
    patch = vision.get("patch_size", 16)
    data = {
        "image_size": size,
        "resampling": said.get("interpolation", "bicubic"),
        "fit": FITS[said.get("resize_mode", "shortest")],
    }
    embedding = {
        "patch": patch,
        "cut_rest": bool(size % patch),
        "mean": list(said.get("mean") or CLIP_MEAN),
        "std": list(said.get("std") or CLIP_DEVIATION),
    }
    return data, embedding


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of open_clip's weights; the projections are (in, out) there already."""
    model = config["model"]
    text = "text." if "text.token_embedding.weight" in names else ""
    visual, layer = "visual.", "transformer.resblocks.{layer}"
    entries = [
        *vocabulary(model, [f"{text}token_embedding.weight"])[0],
        line(f"{text}positional_embedding", "embedders_text/positions"),
        *blocks(f"{text}{layer}", "transformer", BLOCK, main_options(model)),
        *norm(f"{text}ln_final", "transformer/norm"),
        *patches(
            config,
            f"{visual}conv1",
            f"{visual}positional_embedding",
            f"{visual}class_embedding",
        ),
        *norm(f"{visual}ln_pre", "embedders_image/norm"),
        *blocks(f"{visual}{layer}", "towers_image", BLOCK, tower_options(model)),
        *norm(f"{visual}ln_post", "towers_image/norm"),
        line(f"{visual}proj", f"{CONTRAST}/project_image/kernel"),
        line(f"{text}text_projection", f"{CONTRAST}/project_text/kernel"),
        line("logit_scale", f"{CONTRAST}/log_scale"),
    ]
    return Table(entries, {r"(text\.)?attn_mask": "a causal mask, not learned"})


def refuse_lower_end(source: Source, tokenizer: TextTokenizer) -> None:
    """Checks that the end of a text is the highest id there is, where its towers pool.

    Raises:
      ValueError: if it is not.
    """
    if tokenizer.eos_id != tokenizer.vocabulary_size - 1:
        raise ValueError(
            f"{source.path}: texts are pooled at their highest id, but its tokenizer ends them "
            f"with {tokenizer.eos_id} of {tokenizer.vocabulary_size}"
        )


OPEN_CLIP = Family(
    name="open_clip",
    types=("open_clip",),
    part="both",
    fields=fields,
    table=table,
    tokens=TokenLayout(
        clip_files, defaults=CLIP_TOKENS.defaults, eos_when_cut=True, check=refuse_lower_end
    ),
)
