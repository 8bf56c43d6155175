"""AST (Gong et al. 2021) and Whisper's encoder (Radford et al. 2022): audio towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from unified_mm.data.sounds import RATE
from unified_mm.modalities.audio import AudioModality
from unified_mm.modalities.spectrogram import HOP, WINDOW
from unified_mm.pretrained.family import Family, prefix
from unified_mm.pretrained.fields import STACK, Fields, read, tower_alone, usual
from unified_mm.pretrained.layers import (
    blocks,
    dense,
    line,
    norm,
    projections,
    start_of_scale,
    start_of_tower,
    tower_options,
)
from unified_mm.pretrained.preprocessing import refuse_other, sound_section
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Array, Arrays, Entry, Table, Transform, rearranged
from unified_mm.pretrained.vit import BLOCK as VIT_BLOCK

# What both hear: all of a sound up to `seconds`, with what is after its end.
HEARD = {"attend_padding": True, "modality_embedding": False, "positions": "random"}
AST_STACK = usual(STACK, norm_epsilon=1e-12)
AUDIOSET = (-4.2677393, 4.5689974)  # mean and deviation, where no file says others
CLASS_TOKENS = ("cls_token", "distillation_token")
WHISPER_STACK = {
    "width": ("d_model", 384),
    "layers": ("encoder_layers", 4),
    "heads": ("encoder_attention_heads", 6),
    "feed_forward": ("encoder_ffn_dim", 1536),
    "activation": ("activation_function", "gelu"),
}
WHISPER_BLOCK = {
    **projections("self_attn.{letter}_proj", "self_attn.out_proj"),
    "key_bias": "",
    "attention_norm": "self_attn_layer_norm",
    "feed_forward_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}


def ast_fields(source: Source) -> Fields:
    """Returns the fields of a tower of overlapping patches, pooled at its two class tokens."""
    c, heard = source.config, sound_section(source)
    patch, mels = c.get("patch_size", 16), c.get("num_mel_bins", 128)
    frames = c.get("max_length", 1024)
    if not isinstance(patch, int):
        raise ValueError(f"{c.where}: patch_size={patch}: only squares, one number, are read")
    refuse_other(
        heard, {"num_mel_bins": mels, "max_length": frames}, "both files must be of one model"
    )
    mean, std = (heard.get(name, x) for name, x in zip(("mean", "std"), AUDIOSET, strict=True))
    whole = heard.get("do_normalize", True)
    audio = {
        **HEARD,
        "preset": "kaldi",
        "mels": mels,
        "seconds": (WINDOW + (frames - 1) * HOP) / RATE,
        "mean": mean if whole else 0.0,
        "std": 2 * std if whole else 1.0,
        "patch": [patch, patch],
        "stride": [c.get("time_stride", 10), c.get("frequency_stride", 10)],
        "class_tokens": len(CLASS_TOKENS),
    }
    tower = {**read(c, AST_STACK), "query_bias": bool(c.get("qkv_bias", True))}
    return tower_alone("audio", audio, tower, pool="first_two")


def ast_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of AST's weights without a classifier."""
    audio = AudioModality.from_config("audio", config["model"]["modalities"]["audio"], None)
    patch, across, options = audio.patch[0], audio.grid[1], tower_options(config["model"])
    before = prefix(names, "audio_spectrogram_transformer.", probe="embeddings.cls_token")
    embeddings = f"{before}embeddings"

    def first_and_grid(*arrays: Array) -> Arrays:
        *tokens, positions = (array[0] for array in arrays)
        first = np.concatenate(tokens) + positions[: len(tokens)]
        rest = positions[len(tokens) :]  # theirs go by band, then by time
        return first, rearrange(rest, "(bands steps) d -> steps bands d", bands=across)

    theirs = tuple(f"{embeddings}.{name}" for name in (*CLASS_TOKENS, "position_embeddings"))
    ours = ("embedders_audio/class_tokens", "embedders_audio/positions")
    kernel = rearranged("d 1 bands frames", "(frames bands) d", bands=patch, frames=patch)
    entries = [
        *dense(
            f"{embeddings}.patch_embeddings.projection", "embedders_audio/patches", True, kernel
        ),
        Entry(theirs, ours, Transform(first_and_grid, None)),
        *blocks(f"{before}encoder.layer.{{layer}}", "towers_audio", VIT_BLOCK, options),
        *norm(f"{before}layernorm", "towers_audio/norm"),
    ]
    ignored = {r"classifier\..*": "the classifier: an audio tower has none"}
    return Table(entries, ignored, starts=start_of_scale())


def whisper_fields(source: Source) -> Fields:
    """Returns the fields of a tower whose tokens are moments of 20 ms, pooled by their mean."""
    c, heard = source.config, sound_section(source)
    mels, frames = c.get("num_mel_bins", 80), 2 * c.get("max_source_positions", 1500)
    seconds = frames * HOP / RATE
    refuse_other(heard, {"feature_size": mels}, "both files must be of one model")
    refuse_other(heard, {"chunk_length": seconds}, "both files must be of one model")
    refuse_other(heard, {"hop_length": HOP, "n_fft": WINDOW}, "sounds are heard so here")
    refuse_other(heard, {"dither": 0.0, "do_normalize": False}, "nothing of it is done here")
    audio = {
        **HEARD,
        "preset": "whisper",
        "stem": "convolution",
        "mels": mels,
        "patch": [2, mels],
        "seconds": seconds,
        "std": 1.0,
    }
    tower = {**read(c, WHISPER_STACK), "norm_epsilon": 1e-5}
    return tower_alone("audio", audio, tower, pool="mean")


def whisper_table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of the weights of Whisper's encoder, which its decoder does without."""
    before = "model.encoder." if "model.encoder.conv1.weight" in names else "encoder."
    kernel = rearranged("d inputs taps", "(taps inputs) d", taps=3)
    places, options = rearranged("steps d", "steps 1 d"), tower_options(config["model"])
    entries = [
        *dense(f"{before}conv1", "embedders_audio/convolution_1", True, kernel),
        *dense(f"{before}conv2", "embedders_audio/convolution_2", True, kernel),
        line(f"{before}embed_positions.weight", "embedders_audio/positions", places),
        *blocks(f"{before}layers.{{layer}}", "towers_audio", WHISPER_BLOCK, options),
        *norm(f"{before}layer_norm", "towers_audio/norm"),
    ]
    ignored = {
        r"((model\.)?decoder\.|proj_out\.).*": "the decoder: an audio tower has none",
        r"(projector|classifier)\..*|layer_weights": "the classifier: an audio tower has none",
    }
    return Table(entries, ignored, starts=start_of_tower("audio"))


AST = Family("AST", ("audio-spectrogram-transformer",), "audio", ast_fields, ast_table)
WHISPER = Family("Whisper's encoder", ("whisper",), "audio", whisper_fields, whisper_table)
