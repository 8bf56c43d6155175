"""Attention weights of every layer and head, and a map over the image for each word.

Attention is no explanation of what a model does (Jain & Wallace 2019, "Attention is not
explanation"): it says where values were taken from, not what became of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from unified_mm.analysis.examples import image_row, stacked
from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.predictor import Batch
from unified_mm.nn.attention.rules import View
from unified_mm.nn.sow import ATTENTION, Weights, by_path
from unified_mm.nn.tokens import spans
from unified_mm.nn.transformer import CROSS
from unified_mm.objectives.captioning import Captioning

IMAGE = "image"


def attention_weights(model: LoadedModel, batch: Batch, view: View) -> dict[str, Weights]:
    """Returns the weights of every attention layer in one forward pass.

    Args:
      model: the model.
      batch: arrays by modality, as the data pipeline makes them.
      view: how the text is read.

    Returns:
      By path of each attention layer in the parameter tree
      ('transformer/layers/block_0/attention'), values [L, B, H, Q, K] for the L layers of that
      path (1 outside a stack).
    """
    predictor = model.predictor

    def read(params: Any, batch: Any) -> dict[str, Weights]:
        _, left = predictor.task.model.apply(
            {"params": params}, batch, (view,), method="encode", mutable=[ATTENTION]
        )
        return by_path(left[ATTENTION])

    name = f"attention of {view}"
    found: dict[str, Weights] = predictor.call(name, read, predictor.to_device(batch))
    return jax.device_get(found)


def attention_over_patches(
    model: LoadedModel, image: Any, prompt: str, text: str
) -> tuple[list[str], Float[np.ndarray, "words rows cols"]]:
    """Returns how the attention that wrote each word lies over the image's patches.

    A token is written by the one before it, so a word's map is the mean over those that wrote its
    tokens; it is averaged over heads and layers too and sums to 1. In gated cross-attention text
    attends to latents and these to patches: the map is the product of both, each averaged over
    its heads and layers. It is no explanation: see the module's docstring.

    Args:
      model: the model.
      image: as for `LoadedModel.view`.
      prompt: what the text was written after; '' for a caption.
      text: what the model wrote, or any other text.

    Returns:
      The words of `text` (those that the model reads: it is cut as for training), and for each a
      float32 map over the image's patches from its upper left.

    Raises:
      ValueError: written text sees no patches in this model, or `LoadedModel.view` or the
        tokenizer refuses the input.
    """
    task = model.predictor.task
    view = _writing(model)
    row = {**image_row(model, image), "text": task.modalities["text"].encode(prompt, text)}
    weights = attention_weights(model, stacked([row]), view)
    looks = text_over_image(weights, view.name)[0]
    words, writers = _written(model, prompt, text)
    down, across = patch_grid(model)
    looks = looks[:, looks.shape[1] - down * across :]  # a class token stands before the patches
    maps = np.stack([looks[which].mean(0) for which in writers])
    maps /= np.maximum(maps.sum(1, keepdims=True), np.finfo(np.float32).tiny)
    return words, maps.reshape(-1, down, across)


def text_over_image(
    weights: Mapping[str, Weights], text: str, image: str = IMAGE
) -> Float[np.ndarray, "B T N"]:
    """Returns the attention of each token of group `text` to those of group `image`.

    It is the mean over all layers and heads. With a resampler in between, the attention to its
    latents is passed on to the features that these attend to, and each row keeps its sum.
    """
    kind = CROSS if any(f"/{CROSS}/" in path for path in weights) else "transformer/"
    looks = mean_between([each for path, each in weights.items() if kind in path], text, image)
    resamplers = [each for path, each in weights.items() if f"resamplers_{image}/" in path]
    if not resamplers:
        return looks
    features = mean_between(resamplers, "latents", "features")
    features /= np.maximum(features.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    return looks @ features


def mean_between(layers: list[Weights], query: str, key: str) -> Float[np.ndarray, "B Q K"]:
    """Returns the attention of one group's tokens to another's, averaged over layers and heads."""
    parts = []
    for each in layers:
        rows, columns = spans(each.queries)[query], spans(each.keys)[key]
        parts.append(each.values[..., rows, columns].mean(2))
    return np.concatenate(parts).mean(0)


def _writing(model: LoadedModel) -> View:
    """Returns the view by which the model writes text.

    Raises:
      ValueError: written text sees no patches in this model.
    """
    task = model.predictor.task
    found = [each.view for each in task.objectives if isinstance(each, Captioning)]
    if not found or IMAGE not in task.model.context_names:
        raise ValueError(
            "no attention of text over an image: this model (model.fusion="
            f"{model.config.model.fusion!r}) writes no text about images"
        )
    return found[0]


def _written(
    model: LoadedModel, prompt: str, text: str
) -> tuple[list[str], list[Int[np.ndarray, " tokens"]]]:
    """Returns the words of a text, and for each the positions of the tokens that wrote it."""
    tokenizer = model.predictor.task.tokenizer
    start = len(tokenizer.encode_prompt(prompt))
    if not start:
        raise ValueError("this model's texts have no begin token: give a prompt")
    words, owners = tokenizer.words(text)
    read = np.array(owners[: model.predictor.task.modalities["text"].length - start], int)
    places = [start - 1 + np.flatnonzero(read == number) for number in range(len(words))]
    kept = [number for number, place in enumerate(places) if place.size]
    if not kept:
        raise ValueError(f"the text {text!r} has no word to draw attention for")
    return [words[number] for number in kept], [places[number] for number in kept]


def patch_grid(model: LoadedModel) -> tuple[int, int]:
    """Returns the number of an image's patches from top to bottom, and from left to right."""
    modality = model.predictor.task.modalities[IMAGE]
    side = modality.size // modality.embedding.patch
    return side, side
