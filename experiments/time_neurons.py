"""Times a feed-forward of which a picture uses a fifth of the neurons. The last line is JSON.

    python experiments/time_neurons.py

One feed-forward of random weights, as inference computes it: with all neurons, and with those that
its predictor names, which is timed too. CPU seconds are those of all threads, taken in turns; their
ratios are kept in `results/time_neurons.json`.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.benchmarks.timing import provenance
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.neurons import Neurons
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, single_document
from unified_mm.parallel.sharding import without_names

WIDTH, PATCHES, SHARE = 512, 196, 0.2
TURNS, CALLS = 15, 10


def feed_forward(of: tuple[str, ...], pictures: int, width: int):
    """Returns a call of a compiled feed-forward of which some modalities use few neurons."""
    options = TransformerOptions(width, 1, 8, 4 * width, activation="relu", gathered=True)
    metadata = single_document(
        jnp.ones((pictures, PATCHES), bool), Group("image", "image", PATCHES)
    )
    plan = plan_attention(options, MaskTable((View("t", "prefix"),)), metadata, metadata)
    module = Neurons(options, SHARE, of)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(pictures, PATCHES, width)), jnp.float32)
    params = without_names(jax.jit(module.init)(jax.random.key(0), x, plan))
    program = jax.jit(module.apply).lower(params, x, plan).compile()
    return lambda: program(params, x, plan)


def cpu_seconds(run) -> float:
    """Returns the CPU seconds of some calls."""
    began = time.process_time()
    for _ in range(CALLS):
        jax.block_until_ready(run())
    return time.process_time() - began


def main() -> None:
    """Prints the time with few neurons as a share of that with all."""
    found = {}
    for width, pictures in ((WIDTH, 1), (WIDTH, 8), (128, 1)):
        runs = [feed_forward(of, pictures, width) for of in ((), ("image",))]
        for run in runs:
            cpu_seconds(run)
        took = np.array([[cpu_seconds(run) for run in runs] for _ in range(TURNS)])
        found[f"width {width}, {pictures} of {PATCHES} patches"] = round(
            float(np.median(took[:, 1] / took[:, 0])), 3
        )
    shares = {"share of the time of all neurons": found, "share of neurons": SHARE}
    print(json.dumps({**shares, **provenance()}))


if __name__ == "__main__":
    main()
