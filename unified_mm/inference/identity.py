"""Which model made some vectors."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np

from unified_mm.inference.loaded import LoadedModel
from unified_mm.runs.checksums import tree_checksums


def model_identity(model: LoadedModel) -> dict[str, Any]:
    """What makes a model's vectors comparable: its checkpoint's parameters, and how it reads.

    Where the run lies does not matter.
    """
    parameters = hashlib.sha256()
    params = model.params
    sums = tree_checksums(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parameters.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
    for leaf in jax.tree.leaves(sums):
        parameters.update(np.asarray(leaf).tobytes())
    config = model.saved  # an index stays its model's when later versions name fields otherwise
    reads = {
        "modalities": config["model"]["modalities"],
        "image_size": config["data"]["image_size"],
        "special_tokens": config["data"]["special_tokens"],
        "tokenizer": model.task.tokenizer.as_json(),
    }
    reading = hashlib.sha256(json.dumps(reads, sort_keys=True).encode())
    return {
        "step": model.step,
        "parameters": parameters.hexdigest(),
        "reading": reading.hexdigest(),
    }
