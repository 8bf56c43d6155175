"""What a picture is worth to a text about it, foreseen before any layer reads it.

Noise, a blank page or a lens cap make no caption likelier. How many nats a token a picture adds is
foreseen from its tokens at the stem, by their mean and their spread; where that is below a
calibrated threshold (`python -m unified_mm.calibrate --pictures`), the text is written without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unified_mm.nn.tokens import Tokens, unfold_items

PICTURE = "picture"  # beside the kinds of texts that leave layers early
RIDGE = 0.01  # of the examples' number


def summary(model: Any, batch: Mapping[str, Mapping[str, Array]]) -> Float[Array, "B F"]:
    """Returns mean and standard deviation of the stem's tokens, of one modality after another."""
    parts = []
    for name in model.context_names:
        tokens: Tokens = model.embed_items(name, batch[name])
        parts.append(unfold_items(tokens.embeddings, tokens.metadata, batch[name], 0))
    return jnp.concatenate([each for part in parts for each in spread(part)], axis=1)


def spread(tokens: Tokens) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """Returns mean and standard deviation over the valid tokens; NaN where there are none.

    What is worth NaN is below no threshold: what was fitted to whole examples tells of no others.
    """
    x = tokens.embeddings.astype(jnp.float32)
    there = tokens.metadata.valid[..., None]
    count = there.sum(1, dtype=jnp.float32)
    mean = jnp.where(there, x, 0).sum(1) / count
    variance = jnp.where(there, jnp.square(x - mean[:, None]), 0).sum(1) / count
    return mean, jnp.sqrt(variance)


@dataclass(frozen=True)
class Worth:
    """A linear map from a `summary` to the nats a token that the context is worth.

    Attributes:
      mean, scale: of the summaries that it was fitted to.
      weights: of what is normalised by them.
      bias: nats a token of the mean.
    """

    mean: Sequence[float]
    scale: Sequence[float]
    weights: Sequence[float]
    bias: float

    @classmethod
    def fit(
        cls, summaries: Float[np.ndarray, "examples F"], nats: Float[np.ndarray, " examples"]
    ) -> Worth:
        """Returns the ridge regression of nats a token on summaries.

        Raises:
          ValueError: there are no examples, or a number is not finite.
        """
        x, y = (np.asarray(each, np.float64) for each in (summaries, nats))
        if not len(y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("what a picture is worth is fitted to finite numbers of an example")
        mean, scale = x.mean(0), x.std(0)
        scale[scale == 0] = 1
        x = (x - mean) / scale
        inner = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
        weights = np.linalg.solve(inner, x.T @ (y - y.mean()))
        return cls(mean.tolist(), scale.tolist(), weights.tolist(), float(y.mean()))

    def __call__(self, summaries: Float[np.ndarray, "B F"]) -> Float[np.ndarray, " B"]:
        """Returns the nats a token that each context is worth."""
        found: np.ndarray = (summaries - np.array(self.mean)) / self.scale @ self.weights
        return found + self.bias
