"""What a user asks for, as one program: beams or drawn tokens, and what came out as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from unified_mm.inference.beams import beam_search
from unified_mm.inference.decoding import Decoding
from unified_mm.inference.generate import begin, generate
from unified_mm.inference.sampling import make_sampling, sampling_arrays
from unified_mm.models.masks import Stream
from unified_mm.models.unified import UnifiedModel


def inputs_of(
    decoding: Decoding,
    batch: Mapping[str, Any],
    most: Int[np.ndarray, " B"],
    ends: Sequence[int],
    first: int,
) -> dict[str, Any]:
    """What `write_texts` takes.

    Args:
      batch: context and the beginning of each text.
      most: how many tokens each text may have.
      ends: tokens that end one.
      first: number of the first example, which has a say in what is drawn.
    """
    if decoding.tokens is not None:
        most = np.minimum(most, decoding.tokens)
    inputs: dict[str, Any] = {"batch": batch}
    if decoding.beams > 1:
        inputs["length_penalty"] = np.full(len(most), decoding.length_penalty, np.float32)
    else:
        inputs["sampling"] = sampling_arrays(decoding, len(most), first)
        most = np.repeat(most, decoding.samples)
    inputs["most"] = most.astype(np.int32)
    inputs["stop"] = np.tile(np.array(ends, np.int32), (len(most), 1))
    return inputs


def write_texts(
    model: UnifiedModel,
    params: Any,
    inputs: Mapping[str, Any],
    stream: Stream,
    *,
    beams: int,
    samples: int,
    room: int,
    padding: int,
) -> tuple[Int[Array, "R W"], Float[Array, " R"]]:
    """`samples` texts of each example, R rows: padded tokens, and their log-likelihood in nats."""
    given = dict(inputs)
    batch = given.pop("batch")
    if beams > 1:
        penalty = given.pop("length_penalty")[0]
        found = beam_search(
            model, params, batch, stream, **given,
            beams=beams, length_penalty=penalty, room=room, padding=padding,
        )  # fmt: skip
        written, likelihood = jax.tree.map(
            lambda x: x[:, :samples].reshape(-1, *x.shape[2:]), found
        )
        return written, likelihood
    given["sampling"] = make_sampling(**given["sampling"])
    draft = begin(model, params, batch, stream, **given, room=room, padding=padding)
    draft = generate(model, params, draft, stream, padding)
    return draft.written, draft.likelihood
