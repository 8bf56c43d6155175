"""Features of every layer: the mean of each layer's tokens, for images or for texts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from unified_mm.analysis.examples import image_row, stacked
from unified_mm.inference.loaded import BATCH, LoadedModel, Picture
from unified_mm.models.late import WithTowers
from unified_mm.nn.attention.rules import View
from unified_mm.nn.pooling import pooled
from unified_mm.nn.sow import RESIDUAL, layer_names, streams_by_layer
from unified_mm.objectives.contrastive import Contrastive
from unified_mm.objectives.objective import TextObjective

IMAGE = "image"
MAIN, TOWER = "transformer", f"towers_{IMAGE}"
OUTPUT = "output"  # after the last norm
Features = dict[str, Float[np.ndarray, "rows D"]]  # by layer, the input first


def image_features(model: LoadedModel, images: Iterable[Picture]) -> Features:
    """Returns the mean of each image's tokens after every layer that reads it, without text.

    Args:
      model: the model.
      images: as for `LoadedModel.view`.

    Returns:
      float32 [images, D] by layer: 'embedded' (the patches before any layer), 'layer_0', ...,
      'output' (after the stack's last norm).

    Raises:
      ValueError: there is no image, the model reads none, or `LoadedModel.view` refuses one.
    """
    task = model.predictor.task
    if IMAGE not in task.model.context_names:
        raise ValueError("this model reads no images: it is of text alone")
    view = reading_stream(model)
    names = task.model.context_names
    towers = isinstance(task.model, WithTowers)
    stack, options = (TOWER, task.model.tower_of(IMAGE)) if towers else (MAIN, task.model.options)

    def read(params: Any, batch: Any) -> dict[str, Array]:
        encoded, left = task.model.apply(
            {"params": params}, batch, view, method="read_context", mutable=[RESIDUAL]
        )
        valid = encoded.valid[IMAGE]
        # In one sequence the image's tokens stand after those of earlier modalities.
        before = names[: names.index(IMAGE)] if stack == MAIN else ()
        first = sum(encoded.outputs[name].shape[1] for name in before)
        where = slice(first, first + valid.shape[1])
        streams = streams_by_layer(left[RESIDUAL], stack, options)
        own = {name: x[:, where] for name, x in streams.items()}
        return _means({**own, OUTPUT: encoded.outputs[IMAGE]}, valid)

    rows = (image_row(model, image) for image in images)
    return _gather(model, f"image features of {view}", read, rows, layer_names(options))


def text_features(model: LoadedModel, texts: Sequence[str]) -> Features:
    """Returns the mean of each text's tokens after every layer, without an image.

    Layers and errors are as in `image_features`; a gated cross-attention layer before the blocks
    of period p is 'cross_p'.
    """
    task = model.predictor.task
    view = reading_stream(model, of_text=True)
    options = task.model.options

    def read(params: Any, batch: Any) -> dict[str, Array]:
        text = batch["text"]
        x, left = task.model.apply(
            {"params": params}, text, view, method="read_text", mutable=[RESIDUAL]
        )
        streams = streams_by_layer(left[RESIDUAL], MAIN, options)
        return _means({**streams, OUTPUT: x}, text["valid"])

    rows = ({"text": task.modalities["text"].encode("", text)} for text in texts)
    return _gather(model, f"text features of {view}", read, rows, layer_names(options))


def reading_stream(model: LoadedModel, of_text: bool = False) -> View:
    """Returns the view by which a modality is read alone.

    It is that of the contrastive objective, else that of the first objective that reads text. Of
    text it is one in which the main transformer reads it, and no reader of a contrast does.

    Raises:
      ValueError: no objective reads text.
    """
    objectives = [
        each
        for each in model.task.objectives
        if isinstance(each, TextObjective) and (each.view.with_text or not of_text)
    ]
    if not objectives:
        raise ValueError("this model was trained on no objective that reads text")
    return next((each for each in objectives if isinstance(each, Contrastive)), objectives[0]).view


def _means(streams: dict[str, Array], valid: Array) -> dict[str, Array]:
    return {name: pooled("mean", x, valid) for name, x in streams.items()}


def _gather(
    model: LoadedModel,
    name: str,
    read: Callable[[Any, Any], dict[str, Array]],
    rows: Iterator[dict[str, Any]],
    layers: list[str],
) -> Features:
    """Returns the outputs of `read` for all rows, batch by batch; the last batch is padded."""
    parts: list[dict[str, np.ndarray]] = []
    while some := list(islice(rows, BATCH)):
        batch = stacked(some + some[:1] * (BATCH - len(some)))
        found = jax.device_get(model.predictor.call(name, read, model.predictor.to_device(batch)))
        parts.append({layer: np.asarray(x[: len(some)], np.float32) for layer, x in found.items()})
    if not parts:
        raise ValueError("there is nothing to take features of")
    # A compiled function hands its dictionary back sorted by name.
    names = [*layers, OUTPUT]
    return {layer: np.concatenate([part[layer] for part in parts]) for layer in names}
