"""Times experts beside one dense layer, in turns, with gradient. The last line printed is JSON.

    python experiments/time_experts.py

CPU seconds are those of all threads, which other work on the machine changes little; their ratios
are kept in `results/time_experts.json`.
"""

import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.benchmarks.timing import provenance
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.parallel.sharding import without_names

ROWS, TOKENS, WIDTH, HIDDEN = 64, 96, 128, 512
OWN: dict[str, Any] = {"count": 8, "top_k": 1, "capacity": 1.25}
WAYS: dict[str, dict[str, Any]] = {
    "groups of 8": {"group": 8},
    "groups of 1": {"group": 1},
    "dropless": {"dropless": True},
}
TURNS = 12


def gradient_of(**changes):
    """Returns the compiled gradient of a feed-forward by its parameters and input, as a call."""
    options = TransformerOptions(WIDTH, 1, 4, HIDDEN, **changes)
    module = options.make_feed_forward(options=options)
    group = Group("image", "image", TOKENS)
    metadata = single_document(jnp.ones((ROWS, TOKENS), bool), group)
    plan = plan_attention(options, MaskTable((View("t", "separate"),)), metadata, metadata)
    plan = plan.replace(deterministic=False)  # type: ignore[attr-defined]
    x = jax.random.normal(jax.random.key(0), (ROWS, TOKENS, WIDTH))
    params = without_names(jax.jit(module.init)(jax.random.key(1), x, plan)["params"])

    def loss(params, x):
        y = module.apply({"params": params}, x, plan, rngs={"dropout": jax.random.key(2)})
        return jnp.square(y).sum()

    return partial(jax.jit(jax.grad(loss, (0, 1))), params, x)


def cpu_seconds(run):
    """Returns the CPU seconds that a call takes until its results are ready."""
    began = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - began


def main():
    """Prints each way's CPU seconds as a multiple of the dense layer's."""
    runs = {"dense": gradient_of()}
    for name, more in WAYS.items():
        own = tuple({**OWN, **more}.items())
        runs[name] = gradient_of(feed_forward_type="experts", feed_forward_options=own)
    for run in runs.values():
        cpu_seconds(run)  # compiles
    took = np.median([[cpu_seconds(run) for run in runs.values()] for _ in range(TURNS)], axis=0)
    found = dict(zip(runs, took.tolist(), strict=True))
    ratios = {name: round(each / found["dense"], 3) for name, each in found.items()}
    shape = {"tokens": ROWS * TOKENS, "width": WIDTH, "hidden": HIDDEN, **OWN}
    found = {"dense_cpu_seconds": round(found["dense"], 4), "ratios": ratios}
    print(json.dumps({**found, **shape, **provenance()}))


if __name__ == "__main__":
    main()
