"""A small GPT-2 in a directory as it is published, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tiny

WIDTH, LAYERS, ROWS, PLACES = 8, 2, 310, 20
CONFIG = {
    "model_type": "gpt2",
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": PLACES,
    "vocab_size": ROWS,
}
NAMES = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of GPT-2, of random numbers."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (ROWS, WIDTH),
        "transformer.wpe.weight": (PLACES, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
        "transformer.ln_f.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        for name, wide, narrow in (
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ):
            shapes[f"transformer.h.{layer}.{name}.weight"] = (wide, narrow)
            shapes[f"transformer.h.{layer}.{name}.bias"] = (narrow,)
        for name in ("ln_1", "ln_2"):
            shapes[f"transformer.h.{layer}.{name}.weight"] = (WIDTH,)
            shapes[f"transformer.h.{layer}.{name}.bias"] = (WIDTH,)
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """config.json, model.safetensors and a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    safetensors.numpy.save_file(weights or tensors(), folder / "model.safetensors")
    tiny.tokenizer().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES))
    return folder


def write_vit(folder: Path) -> Path:
    """A small ViT with a classifier."""
    width, hidden, grid = 8, 12, 2
    config = {
        "model_type": "vit",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 4 * grid,
        "patch_size": 4,
    }
    block = "vit.encoder.layer.0"
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, width),
        "vit.embeddings.position_embeddings": (1, grid * grid + 1, width),
        "vit.embeddings.patch_embeddings.projection.weight": (width, 3, 4, 4),
        "vit.embeddings.patch_embeddings.projection.bias": (width,),
        f"{block}.intermediate.dense.weight": (hidden, width),
        f"{block}.intermediate.dense.bias": (hidden,),
        f"{block}.output.dense.weight": (width, hidden),
        f"{block}.output.dense.bias": (width,),
        "classifier.weight": (3, width),
        "classifier.bias": (3,),
    }
    for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
        shapes[f"{block}.attention.{name}.weight"] = (width, width)
        shapes[f"{block}.attention.{name}.bias"] = (width,)
    for name in (f"{block}.layernorm_before", f"{block}.layernorm_after", "vit.layernorm"):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def write_shards(folder: Path) -> Path:
    """The same in two files and an index."""
    whole = tensors()
    write(folder)
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(whole)}
    for shard in set(shards.values()):
        part = {name: whole[name] for name, where in shards.items() if where == shard}
        safetensors.numpy.save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder
