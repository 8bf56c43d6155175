"""The shared space of images and texts: gap, alignment, uniformity, neighbours, a projection.

Embeddings are unit vectors.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

Vectors = Float[np.ndarray, "_ Z"]


def modality_gap(
    images: Float[np.ndarray, "images Z"], texts: Float[np.ndarray, "texts Z"]
) -> float:
    """Returns the distance between the two modalities' mean embeddings, in [0, 2].

    Liang et al. 2022, "Mind the gap: understanding the modality gap in multi-modal contrastive
    representation learning", section 4.2.
    """
    return float(np.linalg.norm(_mean(images) - _mean(texts)))


def alignment(images: Float[np.ndarray, "images Z"], texts: Float[np.ndarray, "_ Z"]) -> float:
    """Returns the mean squared distance of pairs, in [0, 4]; 0 where both of each pair are equal.

    Wang & Isola 2020, "Understanding contrastive representation learning through alignment and
    uniformity on the hypersphere", equation 4 with alpha = 2.

    Raises:
      ValueError: the numbers of images and texts differ.
    """
    if images.shape != texts.shape:
        raise ValueError(f"{len(images)} images and {len(texts)} texts are no pairs: give as many")
    difference = images.astype(np.float64) - texts
    return float(np.square(difference).sum(1).mean())


def uniformity(vectors: Vectors) -> float:
    """Returns the logarithm of the mean Gaussian potential of all pairs; lower is more uniform.

    Wang & Isola 2020, equation 5 with t = 2: at most 0, where all vectors are equal.

    Raises:
      ValueError: there are fewer than two vectors.
    """
    count = len(vectors)
    if count < 2:
        raise ValueError(f"{count} vectors have no pairs: give two or more")
    x = vectors.astype(np.float64)
    lengths = np.square(x).sum(1)
    first, second = np.triu_indices(count, 1)
    squares = np.maximum(lengths[:, None] + lengths - 2 * x @ x.T, 0)[first, second]
    return float(np.log(np.exp(-2 * squares).mean()))


def nearest(
    queries: Float[np.ndarray, "queries Z"], vectors: Float[np.ndarray, "vectors Z"], count: int
) -> tuple[Int[np.ndarray, "queries _"], Float[np.ndarray, "queries _"]]:
    """Returns for each query the vectors with the largest inner products, best first.

    Returns:
      Indices and inner products [queries, count] (fewer where there are fewer vectors). Ties keep
      the order of the vectors.
    """
    products = queries @ vectors.T
    places = np.argsort(-products, axis=1, kind="stable")[:, :count]
    return places, np.take_along_axis(products, places, axis=1)


def principal_plane(*parts: Vectors) -> tuple[list[Float[np.ndarray, "_ 2"]], float]:
    """Projects all vectors onto the two directions in which they vary most (PCA; Pearson 1901).

    Returns:
      The coordinates [n, 2] of each part, and the share of the variance that they explain.
    """
    everything = np.concatenate(parts).astype(np.float64)
    mean = everything.mean(0)
    _, s, vt = np.linalg.svd(everything - mean, full_matrices=False)
    squares = np.square(s)
    share = float(squares[:2].sum() / max(squares.sum(), np.finfo(np.float64).tiny))
    return [(part - mean) @ vt[:2].T for part in parts], share


def _mean(vectors: Vectors) -> Float[np.ndarray, " Z"]:
    return vectors.astype(np.float64).mean(0)
