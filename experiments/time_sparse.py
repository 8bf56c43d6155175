"""Times attention by listed blocks and passes with dropped patches. The last line printed is JSON.

    python experiments/time_sparse.py

CPU seconds are those of all threads, taken in turns. Attention is of 4 heads of width 32: over a
text of 4,096 tokens as a share of `chunked`'s time, over one of 16,384 by blocks alone, and over
the patches of some pictures, each of which sees its neighbours, as a share of the time in which
each sees all. `bytes` are those that a program holds meanwhile, `apart` by how much an output is
another than by the whole mask. Patches of `experiments/recipe.py:tiny` are dropped by `distinct`:
`flops` are counted of a whole example's forward pass, `read` and `embedded` are the times of some
pictures' passes alone.
"""

import json
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recipe import get_config
from unified_mm.benchmarks.timing import provenance
from unified_mm.config import Config
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, TokenMetadata, grid_coords, single_document
from unified_mm.training.sizes import forward_flops, shapes_of

TABLE = MaskTable((View("t", "separate", autoregressive=True),))
PATTERNS: dict[str, dict[str, int]] = {
    "window 256": {"window": 256},
    "window 128, 64 global, 3 random": {"window": 128, "first": 64, "random": 3},
}
TOKENS, LONG = 4096, 16_384
SIDE, NEAR = 16, 2  # patches of a picture's side; rows and columns that a patch sees around it
GRIDS: dict[str, tuple[str, dict[str, int]]] = {
    "dense": ("xla", {}),
    "masked": ("xla", {"grid": NEAR}),
    "blocks": ("blocks", {"grid": NEAR}),
    "auto": ("auto", {"grid": NEAR}),
}
KEEPS = (1.0, 0.5, 0.35, 0.2)
PICTURES = 8
READ = 32  # pictures that are read, of whose patches some are dropped
TURNS = 5


def text(tokens: int) -> TokenMetadata:
    """Returns one text."""
    return single_document(jnp.ones((1, tokens), bool), Group("t", "text", tokens))


def patches(side: int) -> TokenMetadata:
    """Returns some pictures of so many patches a side."""
    group = Group("image", "image", side * side, grid=(0, side, side))
    valid = jnp.ones((PICTURES, side * side), bool)
    return single_document(valid, group, np.zeros(side * side, np.float32), grid_coords(group))


def attention(
    backend: str, sparse: dict[str, int], metadata: TokenMetadata, gradient: bool
) -> tuple[Any, int]:
    """Returns one attention, compiled, as a call; and the bytes that it holds meanwhile."""
    pairs = ((metadata.groups[0].modality, tuple(sparse.items())),) if sparse else ()
    options = TransformerOptions(128, 1, 4, 512, attention=backend, sparse=pairs)
    (seen_by,) = plan_attention(options, TABLE, metadata, metadata).masks
    rng = np.random.default_rng(0)
    shape = (*metadata.valid.shape, 4, 32)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]

    def attend(*arrays: Any) -> Any:
        return seen_by.attend(*arrays, seen_by)

    run = jax.grad(lambda *x: jnp.square(attend(*x)).sum(), (0, 1, 2)) if gradient else attend
    program = jax.jit(run).lower(*arrays).compile()
    memory: Any = program.memory_analysis()
    return partial(program, *arrays), memory.temp_size_in_bytes


def picture(keep: float) -> tuple[Any, Any, int]:
    """Returns passes over some pictures, compiled, as calls; and an example's counted FLOPs.

    One reads them for texts, which need the last layer's keys and values alone; one embeds them.
    """
    config = get_config("tiny")
    config.model.dropping.keep, config.model.dropping.by = keep, "distinct"
    task, shapes = shapes_of(Config(config.to_dict()))
    flops = forward_flops(task, shapes)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
    batch: Any = jax.tree.map(jnp.asarray, task.example_batch(READ))
    view = next(each.view for each in task.objectives if each.name == "captioning")  # type: ignore[attr-defined]

    def read(params: Any, batch: Any) -> Any:
        found: Any = task.model.apply({"params": params}, batch, view, method="prefix")
        return found.layers

    def embed(params: Any, batch: Any) -> Any:
        return task.embed(params, {"image": batch["image"]}, "image", "contrastive")

    return partial(jax.jit(read), params, batch), partial(jax.jit(embed), params, batch), flops


def cpu_seconds(run: Any) -> float:
    """Returns the CPU seconds that a call takes until its results are ready."""
    began = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - began


def ratios(runs: dict[Any, Any]) -> dict[Any, float]:
    """Returns each call's CPU seconds as a share of the first one's, the median of some turns."""
    for run in runs.values():
        cpu_seconds(run)  # compiles
    took = np.median([[cpu_seconds(run) for run in runs.values()] for _ in range(TURNS)], axis=0)
    return dict(zip(runs, (took / took[0]).round(3).tolist(), strict=True))


def apart(one: Any, other: Any) -> float:
    """Returns the largest difference between the results of two calls."""
    found = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), one(), other())
    return max(jax.tree.leaves(found))


def main() -> None:
    """Prints the shares of `chunked`'s time, of dense attention's and of that of all patches."""
    rows = []
    for name, sparse in PATTERNS.items():
        for gradient in (False, True):
            (whole, _), (run, held) = (
                attention(each, sparse, text(TOKENS), gradient) for each in ("chunked", "blocks")
            )
            share = ratios({"chunked": whole, "blocks": run})["blocks"]
            row = {"pattern": name, "gradient": gradient, "tokens": TOKENS, "of_chunked": share}
            rows.append({**row, "bytes": held, "apart": apart(whole, run)})
            print(rows[-1], file=sys.stderr)
    long = []
    for gradient in (False, True):
        run, held = attention("blocks", PATTERNS["window 256"], text(LONG), gradient)
        taken = round(min(cpu_seconds(run) for _ in range(2)), 3)
        long.append({"gradient": gradient, "tokens": LONG, "cpu_seconds": taken, "bytes": held})
        print(long[-1], file=sys.stderr)
    grid = []
    for gradient in (False, True):
        runs = {
            name: attention(backend, sparse, patches(SIDE), gradient)[0]
            for name, (backend, sparse) in GRIDS.items()
        }
        off = apart(runs["masked"], runs["blocks"])
        grid.append({"gradient": gradient, "of_dense": ratios(runs), "apart": off})
        print(grid[-1], file=sys.stderr)
    passes = {keep: picture(keep) for keep in KEEPS}
    read = ratios({keep: run for keep, (run, _, _) in passes.items()})
    embedded = ratios({keep: run for keep, (_, run, _) in passes.items()})
    dropped = [
        {
            "keep": keep,
            "flops": round(flops / passes[1.0][2], 3),
            "read": read[keep],
            "embedded": embedded[keep],
        }
        for keep, (_, _, flops) in passes.items()
    ]
    found = {"attention": rows, "long": long, "grid": grid, "patches": dropped}
    print(json.dumps({**found, **provenance()}))


if __name__ == "__main__":
    main()
