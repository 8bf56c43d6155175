"""What texts cost to write: FLOPs of the program that writes them, by what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from unified_mm.costs.flops import matmul_flops
from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.generate import WRITING
from unified_mm.inference.predictor import Predictor, inputs_of
from unified_mm.inference.worth import summary
from unified_mm.nn.transformer import EXIT


def text_flops(
    predictor: Predictor,
    prompts: Sequence[str],
    tokens: Float[np.ndarray, " texts"],
    left: Sequence[float] = (),
) -> int:
    """Counts the FLOPs of texts, of all together, each written by itself after its context.

    Beside others a text takes more: layers are run until the last of them has left.

    Args:
      predictor: of the model.
      prompts: of each text, '' for a caption.
      tokens: of each text, its end included.
      left: for each exit the share of all tokens but the first that have left after it; without it
        all layers are run and no exit is checked.
    """
    lengths: dict[int, list[float]] = {}
    for prompt, count in zip(prompts, tokens, strict=True):
        text, _ = predictor.prompts([prompt])
        lengths.setdefault(text["ids"].shape[1], []).append(count)
    return sum(
        len(counts) * one_text_flops(predictor, width, float(np.mean(counts)), left)
        for width, counts in lengths.items()
    )


def one_text_flops(
    predictor: Predictor, width: int, tokens: float, left: Sequence[float] = ()
) -> int:
    """Counts the FLOPs of one text after a prompt [1, width], with as many tokens in the mean."""
    task = predictor.task
    length, exits = task.modalities["text"].length, task.model.options.exits
    example, whole = task.example_batch(1), np.ones((1, width), bool)
    batch = {name: example[name] for name in task.model.context_names}
    batch["text"] = {"ids": whole.astype(np.int32), "valid": whole, "present": whole[:, 0]}
    ends = GREEDY.stop_ids(task.tokenizer)
    threshold = np.ones(1, np.float32) if left else None
    inputs = inputs_of(GREEDY, batch, np.array([length - width]), ends, 0, threshold)
    writer = predictor.writer(length - 1)

    def write(params: Any, inputs: Any) -> Any:
        return writer.generate(params, writer.begin(params, inputs)).written

    # In the order of `lax.cond`: the layers after an exit are run, or left out.
    gone = zip(exits, left, strict=True) if left else ()
    shares = {f"{EXIT}_{layer}": (1 - share, share) for layer, share in gone}
    steps = {WRITING: max(tokens - 1, 0)}
    return matmul_flops(write, predictor.params, inputs, shares=shares, steps=steps)


def summary_flops(predictor: Predictor) -> int:
    """Counts the FLOPs of foreseeing what the context of one example is worth."""
    model = predictor.task.model
    batch = {name: predictor.task.example_batch(1)[name] for name in model.context_names}

    def summarise(params: Any, batch: Any) -> Any:
        return model.apply({"params": params}, batch, method=summary)

    return matmul_flops(summarise, predictor.params, batch)
