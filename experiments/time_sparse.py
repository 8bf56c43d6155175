"""Times attention by listed blocks and passes with dropped patches. The last line printed is JSON.

    python experiments/time_sparse.py

CPU seconds are those of all threads, taken in turns.
Attention is of one example, 4 heads of width 32; `bytes` are those that
a program holds meanwhile. Patches are those of `experiments/recipe.py:tiny`: `flops` are counted of
a whole example's forward pass, and `picture` is the time of a picture's alone.
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
from unified_mm.config import Config
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.training.sizes import forward_flops, shapes_of

TABLE = MaskTable((View("t", "separate", autoregressive=True),))
PATTERNS: dict[str, dict[str, int]] = {
    "window 256": {"window": 256},
    "window 128, 64 global, 3 random": {"window": 128, "first": 64, "random": 3},
}
KEEPS = (1.0, 0.5, 0.35, 0.2)
PICTURES = 8
TURNS = 5


def attention(backend: str, sparse: dict[str, int], tokens: int, gradient: bool) -> Any:
    """Returns one attention, compiled, as a call; and the bytes that it holds meanwhile."""
    pairs = (("text", tuple(sparse.items())),)
    options = TransformerOptions(128, 1, 4, 512, attention=backend, sparse=pairs)
    metadata = single_document(jnp.ones((1, tokens), bool), Group("t", "text", tokens))
    (seen_by,) = plan_attention(options, TABLE, metadata, metadata).masks
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, tokens, 4, 32)), jnp.float32) for _ in range(3)]

    def attend(*arrays: Any) -> Any:
        return seen_by.attend(*arrays, seen_by)

    run = jax.grad(lambda *x: jnp.square(attend(*x)).sum(), (0, 1, 2)) if gradient else attend
    program = jax.jit(run).lower(*arrays).compile()
    memory: Any = program.memory_analysis()
    return partial(program, *arrays), memory.temp_size_in_bytes


def picture(keep: float) -> Any:
    """Returns the pass over some pictures, compiled, as a call; and an example's counted FLOPs."""
    config = get_config("tiny")
    config.model.dropping.keep = keep
    task, shapes = shapes_of(Config(config.to_dict()))
    flops = forward_flops(task, shapes)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
    batch: Any = jax.tree.map(jnp.asarray, task.example_batch(PICTURES))
    view = next(each.view for each in task.objectives if each.name == "captioning")  # type: ignore[attr-defined]

    def read(params: Any, batch: Any) -> Any:
        found: Any = task.model.apply({"params": params}, batch, view, method="prefix")
        return found.layers

    return partial(jax.jit(read), params, batch), flops


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


def main() -> None:
    """Prints the shares of `chunked`'s time and of that of all patches."""
    rows = []
    for name, sparse in PATTERNS.items():
        for gradient in (False, True):
            one, other = (attention(each, sparse, 4096, gradient) for each in ("chunked", "blocks"))
            share = ratios({"chunked": one[0], "blocks": other[0]})["blocks"]
            row = {"pattern": name, "gradient": gradient, "tokens": 4096}
            rows.append({**row, "of_chunked": share, "bytes": other[1]})
            print(rows[-1], file=sys.stderr)
    run, held = attention("blocks", PATTERNS["window 256"], 16_384, True)
    long = {"tokens": 16_384, "cpu_seconds": round(cpu_seconds(run), 3), "bytes": held}
    passes = {keep: picture(keep) for keep in KEEPS}
    shares = ratios({keep: run for keep, (run, _) in passes.items()})
    dropped = [
        {"keep": keep, "flops": round(flops / passes[1.0][1], 3), "picture": shares[keep]}
        for keep, (_, flops) in passes.items()
    ]
    print(json.dumps({"attention": rows, "long": long, "patches": dropped}))


if __name__ == "__main__":
    main()
