"""Directories as transformers writes them, and our model on what is imported of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from unified_mm.config import Config
from unified_mm.import_weights import Imported, import_directory
from unified_mm.objectives.objective import text_valid
from unified_mm.task import Task, build_task

VOCABULARY = 310  # more than the tokenizer's 300, and no multiple of 64
LENGTH = 12
END = 3  # of the tokenizer's <unk>, which ends texts here
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": END,  # 2 would mean the highest id, as in the first published files
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "max_position_embeddings": 20,
    "vocab_size": VOCABULARY,
}
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def randomised(model: Any, seed: int = 0) -> Any:
    """A torch model in evaluation mode, every parameter moved off its start."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """The model in a directory, with a small tokenizer beside it."""
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, **names: Any) -> None:
    tiny.tokenizer().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | names))


def opened(folder: Path) -> tuple[Imported, Task]:
    imported = import_directory(folder)
    assert imported.tokenizer is not None
    return imported, build_task(Config(imported.config), imported.tokenizer)


def text_batch(ids: np.ndarray, valid: np.ndarray | None = None) -> dict[str, Any]:
    """A batch [B, T] of texts alone."""
    here = np.ones(ids.shape, bool) if valid is None else valid
    rows = np.ones(len(ids), bool)
    text = {"ids": ids, "valid": here, "scored": here, "present": rows, "prompted": ~rows}
    return {"text": {key: jnp.asarray(value) for key, value in text.items()}}


def pixels(rows: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (rows, size, size, 3)).astype(np.uint8)


def normalised(images: np.ndarray, imported: Imported, of: str = "image") -> np.ndarray:
    """What transformers' models take: float32 [..., 3, size, size]."""
    image = imported.config["model"]["modalities"][of]
    mean, std = (np.array(image[key], np.float32) for key in ("mean", "std"))
    return np.moveaxis((images / np.float32(255) - mean) / std, -1, -3).astype(np.float32)


def apply(imported: Imported, task: Task, function: Any, batch: Any) -> np.ndarray:
    """`function(model, batch)` with the imported parameters."""

    def call(params: Any, batch: Any) -> Any:
        return task.model.apply({"params": params}, batch, method=function)

    return np.asarray(jax.jit(call)(imported.params, batch))


def logits(imported: Imported, task: Task, batch: Any) -> np.ndarray:
    """Scores of the next token [B, T, V], of the tokens that the weights know."""
    (objective,) = task.objectives

    def score(model: Any, batch: Any) -> Any:
        return model.logits(model.encode(batch, objective.views())[objective.name].text)

    used = task.modalities["text"].embedding.used
    return apply(imported, task, score, batch)[..., :used]


def contrast(imported: Imported, task: Task, images: np.ndarray, batch: Any) -> np.ndarray:
    """Scores of texts (rows) and pictures (columns), with scale and bias."""
    (objective,) = task.objectives
    rows = jnp.ones(len(images), bool)
    whole = {"image": {"pixels": jnp.asarray(images), "present": rows}, **batch}

    def embed(model: Any, batch: Any) -> Any:
        encoded = model.encode(batch, objective.views())[objective.name]
        head = model.head[objective.name]
        scale, bias = head.scale_and_bias()
        image = head("image", encoded.outputs["image"], encoded.valid["image"])
        text = head("text", encoded.text, text_valid(batch["text"]))
        return scale * text @ image.T + bias

    return apply(imported, task, embed, whole)


def texts(task: Task) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of different lengths, as our tokenizer ends and pads them."""
    rows = [task.modalities["text"].encode("", text) for text in ("red", "a red square", "of size")]
    ids, valid = (np.stack([row[key] for row in rows]) for key in ("ids", "valid"))
    return ids, text_batch(ids, valid)


def assert_close(ours: np.ndarray, theirs: Any, relative: float = 1e-4) -> None:
    """Within a share of the largest magnitude."""
    expected = np.asarray(theirs.detach() if hasattr(theirs, "detach") else theirs)
    assert ours.shape == expected.shape
    assert np.abs(expected).max() > 1e-3
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < relative, error
