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
