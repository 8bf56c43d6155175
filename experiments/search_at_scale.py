"""Measures a search index of a million vectors: recall of its graph and latency of whole queries.

    python -m experiments.search_at_scale --run=RUN --images=DIR --split=val \
        --queries=test_composition --output=experiments/results/search_at_scale.json

The vectors are embeddings of DIR's images and captions (of `--split`), drawn at random, each with
noise of its own. The queries are captions of another split, which the run's model tokenizes and
embeds one at a time before the index, as `unified_mm.index` writes it, is searched. Run it on as
many cores as the result is to describe: `taskset -c 0,1 python -m ...`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from unified_mm.benchmarks.timing import provenance, times_of
from unified_mm.cli.messages import exit_code, new_file, say
from unified_mm.files import write_json
from unified_mm.inference.loaded import LoadedModel, load
from unified_mm.search.evaluation import recall_of_exact
from unified_mm.search.index_writer import write_index
from unified_mm.search.items import read_items
from unified_mm.search.nearest import write_vectors
from unified_mm.search.search_index import Rows, SearchIndex, model_identity, write_metadata

SEED, TOP, WARM_UP = 0, 10, 20
EXACT = 100  # queries that are timed with all vectors compared
PART = 50_000  # vectors made at a time


def main(arguments: Sequence[str] | None = None) -> None:
    logging.set_verbosity(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="the run's folder")
    parser.add_argument("--images", required=True, metavar="DIR", help="a COCO set")
    parser.add_argument("--split", default="val", help="whose vectors are multiplied (val)")
    parser.add_argument("--queries", default="test_composition", help="whose captions ask")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="how many (1000000)")
    parser.add_argument("--asked", type=int, default=1000, help="how many captions ask (1000)")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="length of what is added to a unit vector (0.5)"
    )
    parser.add_argument("--output", default="", metavar="FILE.json", help="new, for the result")
    options = parser.parse_args(arguments)
    sys.exit(exit_code(lambda: measure(options)))


def measure(options: argparse.Namespace) -> int:
    """Builds the index, measures it, writes and prints the result, and returns the exit code."""
    output = new_file(options.output)
    model = load(options.run)
    asking = read_items(options.images, [options.queries])
    texts = [captions[0] for captions in asking.captions if captions][: options.asked]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_index(model, read_items(options.images, [options.split]), folder / "real", say)
        real = SearchIndex.open(folder / "real").nearest
        base = np.concatenate([real[kind].vectors for kind in real])
        (built,) = times_of(lambda: build(model, base, folder / "large", options), 1)
        (opened,) = times_of(lambda: SearchIndex.open(folder / "large"), 1)
        index = SearchIndex.open(folder / "large")
        origin = provenance()
        sizes = {file.name: file.stat().st_size for file in (folder / "large").iterdir()}
        result = {
            "vectors": options.vectors,
            "width": base.shape[1],
            "made_of": {kind: len(nearest) for kind, nearest in real.items()},
            "noise": options.noise,
            "seed": SEED,
            "queries": len(texts),
            "recall_at_10": recall_of_exact(index.nearest["image"], model.embed_texts(texts), TOP),
            "build_seconds": round(built, 1),
            "open_seconds": round(opened, 2),
            "bytes": sizes,
            **latencies(model, index, texts),
            "model": {"step": model.step, "width": model.config.model.width},
            **origin,
            "versions": {**origin["versions"], "usearch": metadata.version("usearch")},
        }
    for name, value in result.items():
        say(f"{name:<20}{value}")
    if output is not None:
        write_json(output, result)
    say(json.dumps(result))
    return 0


def build(
    model: LoadedModel, base: Float[np.ndarray, "rows Z"], folder: Path, options: argparse.Namespace
) -> None:
    """Writes an index of noisy copies of the base, always with a graph."""
    folder.mkdir()
    shape = (options.vectors, base.shape[1])
    write_vectors(folder, "image", noisy(base, *shape, options.noise), shape, exact_up_to=0)
    names = [f"{number:07}.jpg" for number in range(options.vectors)]
    header = {"model": model_identity(model), "folder": "", "splits": [], "problems": []}
    write_metadata(folder, header, Rows(names, [0] * len(names), [], []))


def noisy(
    base: Float[np.ndarray, "rows Z"], count: int, width: int, noise: float
) -> Iterator[Float[np.ndarray, "part Z"]]:
    """Yields unit vectors [part, Z], drawn at random from the base, with Gaussian noise.

    Args:
      base: the unit vectors to draw from.
      count: how many vectors are drawn in all.
      width: Z.
      noise: the root mean square length of the noise that is added to each.
    """
    rng = np.random.default_rng(SEED)
    for start in range(0, count, PART):
        chosen = base[rng.integers(0, len(base), min(PART, count - start))]
        added = rng.standard_normal(chosen.shape, dtype=np.float32) * (noise / width**0.5)
        vectors = chosen + added
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def latencies(model: LoadedModel, index: SearchIndex, texts: Sequence[str]) -> dict[str, Any]:
    """Returns percentiles of query times in ms: in all, of each part, and of exact search."""
    query_times(model, index, texts[:WARM_UP])
    times = query_times(model, index, texts)
    nearest = index.nearest["image"]
    vectors = iter(model.embed_texts(texts[:EXACT]))
    times["exact"] = times_of(lambda: nearest.exact(next(vectors)[None], TOP), len(texts[:EXACT]))
    return {
        f"{name}_ms": {
            f"p{share}": round(1000 * float(np.percentile(taken, share)), 3) for share in (50, 95)
        }
        for name, taken in times.items()
    }


def query_times(
    model: LoadedModel, index: SearchIndex, texts: Sequence[str]
) -> dict[str, list[float]]:
    """Returns the seconds of each query and of its parts."""
    times: dict[str, list[float]] = {"query": [], "embedding": [], "search": []}
    for text in texts:
        began = time.perf_counter()
        vector = model.embed_texts([text])[0]
        embedded = time.perf_counter()
        index.search(vector, TOP)
        found = time.perf_counter()
        times["query"].append(found - began)
        times["embedding"].append(embedded - began)
        times["search"].append(found - embedded)
    return times


if __name__ == "__main__":
    main()
