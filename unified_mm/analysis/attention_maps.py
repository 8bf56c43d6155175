"""Where attention lies: weights of every layer and head, and a map for each word on its image.

Attention is no explanation of what a model does (Jain & Wallace 2019, "Attention is not
explanation"): it says where values were taken from, not what became of them. A map of it is
something to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.predictor import Batch
from unified_mm.nn.attention.rules import View
from unified_mm.nn.sow import ATTENTION, Weights, by_path
from unified_mm.nn.tokens import spans
from unified_mm.nn.transformer import CROSS
from unified_mm.objectives.captioning import Captioning

IMAGE = "image"


def attention_weights(model: LoadedModel, batch: Batch, view: View) -> dict[str, Weights]:
    """The weights of every attention of one pass, by layer and head.

    Args:
      batch: arrays by modality, as the data pipeline makes them.
      stream: how the text is read.

    Returns:
      By path of each attention in the parameter tree ('transformer/layers/block_0/attention'),
      values [L, B, H, Q, K] for the L layers of that path (1 outside a stack).
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
) -> tuple[list[str], Float[np.ndarray, "W rows cols"]]:
    """How the attention that wrote each word lies over the image's patches.

    A token is written by the one before it, so a word's map is the mean over those that wrote its
    tokens; it is averaged over heads and layers too and sums to 1. In gated cross-attention text
    looks at latents and these at patches: the map is the product of both, each averaged over its
    heads and layers. It is no explanation: see the module's docstring.

    Args:
      image: as for `LoadedModel.view`.
      prompt: what the text was written after; '' for a caption.
      text: what the model wrote, or any other text.

    Returns:
      The W words of `text` (those that the model reads: it is cut as for training), and a map for
      each, float32, the image's patches from its upper left.

    Raises:
      ValueError: a model in which written text sees no patches, or what `view` and the tokenizer
        refuse.
    """
    task = model.predictor.task
    view = _writing(model)
    row = {name: task.modalities[name].absent() for name in task.model.context_names}
    row[IMAGE] = {"pixels": model.view(image), "present": np.array(True)}
    row["text"] = task.modalities["text"].encode(prompt, text)
    batch = jax.tree.map(lambda leaf: leaf[None], row)
    weights = attention_weights(model, batch, view)
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
    """How each token of the group `text` looks at those of `image`, over all heads and layers.

    Where resampled features stand between, each row sums to what the text takes from these.
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
    """What tokens of one group take from those of another, the mean of all layers and heads."""
    parts = []
    for each in layers:
        rows, columns = spans(each.queries)[query], spans(each.keys)[key]
        parts.append(each.values[..., rows, columns].mean(2))
    return np.concatenate(parts).mean(0)


def _writing(model: LoadedModel) -> View:
    """The stream that the model writes by. Raises ValueError where it sees no patches."""
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
    """The words of a text, and by word the places of the tokens that wrote it."""
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
    """How many patches an image has from top to bottom, and from left to right."""
    modality = model.predictor.task.modalities[IMAGE]
    side = modality.size // modality.embedding.patch
    return side, side
