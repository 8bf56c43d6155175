"""Search for the nearest of many unit vectors: exact where they are few, else with a graph.

The graph is a hierarchical navigable small world (Malkov and Yashunin 2016, arXiv:1603.09320), made
and searched by usearch over vectors rounded to bfloat16. What it proposes is scored again with the
float32 vectors: scores are exact either way, and the graph can but miss a neighbour.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Up to so many vectors all are compared. At width 128 two CPU cores take a millisecond for them;
# the work grows with their number and is bound by memory.
EXACT_UP_TO = 50_000

# Neighbours of a node, candidates kept while the graph is made and while it is searched (the
# paper's M, efConstruction and ef), and candidates scored again for each that is asked for.
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH, _OVERSAMPLE = 32, 64, 256, 4
_ADDED_AT_ONCE = 10_000
_SCORES_AT_ONCE = 2**26


class Found(NamedTuple):
    """The nearest vectors of each query, best first: their numbers and inner products."""

    numbers: Int[np.ndarray, "queries found"]
    scores: Float[np.ndarray, "queries found"]


class Nearest:
    """Vectors to be searched, one at least; threads may share it.

    Attributes:
      vectors: float32, unit norm.
      graph: of usearch; None where all vectors are compared.
    """

    def __init__(self, vectors: Float[np.ndarray, "vectors Z"], graph: Any = None) -> None:
        self.vectors = vectors
        self.graph = graph
        self._asking = threading.Lock()  # a graph's searches share their scratch memory

    @classmethod
    def open(cls, folder: Path, name: str) -> Nearest:
        """Opens what `write_vectors` wrote: vectors with a graph are memory-mapped, others read."""
        vectors, graph = folder / f"{name}.npy", folder / f"{name}.usearch"
        if not graph.exists():
            return cls(np.load(vectors))
        restored = _usearch().Index.restore(
            graph, view=True, expansion_search=_EXPANSION_SEARCH, enable_key_lookups=False
        )
        return cls(np.load(vectors, mmap_mode="r"), restored)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: Float[np.ndarray, "queries Z"], count: int) -> Found:
        """Returns the `count` nearest of each query, or all where there are fewer."""
        if self.graph is None:
            return self.exact(queries, count)
        found = [self._ask(query, min(count, len(self))) for query in queries]
        return Found(*(np.stack(parts) for parts in zip(*found, strict=True)))

    def exact(self, queries: Float[np.ndarray, "queries Z"], count: int) -> Found:
        """Returns what `search` does, with all vectors compared."""
        count = min(count, len(self))
        step = max(1, _SCORES_AT_ONCE // len(self))
        parts = []
        for start in range(0, len(queries), step):
            scores = queries[start : start + step] @ self.vectors.T
            best = np.argpartition(-scores, min(count, len(self) - 1), axis=1)[:, :count]
            parts.append(_sorted(best, np.take_along_axis(scores, best, axis=1)))
        return Found(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _ask(self, query: Float[np.ndarray, " Z"], count: int) -> tuple[np.ndarray, np.ndarray]:
        with self._asking:
            proposed = self.graph.search(query, min(_OVERSAMPLE * count, len(self)), threads=1)
        numbers = proposed.keys.astype(np.int64)
        if len(numbers) < count:  # where many are asked for, a graph may not reach them all
            all_compared = self.exact(query[None], count)
            return all_compared.numbers[0], all_compared.scores[0]
        found = _sorted(numbers[None], (self.vectors[numbers] @ query)[None])
        return found.numbers[0, :count], found.scores[0, :count]


def write_vectors(
    folder: Path,
    name: str,
    parts: Iterable[Float[np.ndarray, "_ Z"]],
    shape: tuple[int, int],
    *,
    exact_up_to: int = EXACT_UP_TO,
) -> None:
    """Writes `name`.npy, and `name`.usearch where there are more vectors than `exact_up_to`.

    Args:
      parts: of the vectors, unit norm, in order.
      shape: how many there are in all, one at least, and their width.

    Raises:
      ValueError: usearch is needed and not installed, or cannot write.
    """
    path = folder / f"{name}.npy"
    with open(path, "wb") as file:  # a file that is mapped would crash where the disk is full
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        filled = 0
        for part in parts:
            file.write(part.astype("<f4").tobytes())
            filled += len(part)
    if filled != shape[0]:
        raise ValueError(f"{path}: {filled} of {shape[0]} vectors came")
    if filled > exact_up_to:
        graph = _build_graph(np.load(path, mmap_mode="r"))
        try:
            graph.save(os.fspath(folder / f"{name}.usearch"))
        except RuntimeError as error:  # which does not say more
            raise ValueError(f"{name}.usearch: {error}; is there room on the disk?") from error


def _build_graph(vectors: Float[np.ndarray, "vectors Z"]) -> Any:
    """Builds a graph over the vectors by their numbers.

    Its edges depend on the order in which the threads run.
    """
    from tqdm import tqdm

    graph = _usearch().Index(
        ndim=vectors.shape[1],
        metric="ip",
        dtype="bf16",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
        enable_key_lookups=False,
    )
    with tqdm(total=len(vectors), desc="joining", unit="vector", disable=None) as bar:
        for start in range(0, len(vectors), _ADDED_AT_ONCE):
            part = np.ascontiguousarray(vectors[start : start + _ADDED_AT_ONCE])
            graph.add(np.arange(start, start + len(part)), part, threads=os.cpu_count() or 1)
            bar.update(len(part))
    return graph


def _sorted(
    numbers: Int[np.ndarray, "queries found"], scores: Float[np.ndarray, "queries found"]
) -> Found:
    """Returns the results sorted: best first, and of equal scores the lower number."""
    order = np.lexsort((numbers, -scores), axis=1)
    return Found(
        np.take_along_axis(numbers, order, axis=1), np.take_along_axis(scores, order, axis=1)
    )


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise ValueError(
            "so many vectors are searched with usearch, which is not installed: "
            "pip install 'unified_mm[search]'"
        ) from error
    return usearch.index
