"""Times writing with an exit half way beside all layers, in turns. The last line printed is JSON.

    python experiments/time_exits.py

A model of random weights writes 32 tokens after a picture, once with all layers, once where every
token leaves at the exit, and once where the exit is checked and none leaves. CPU seconds are those
of all threads, which other work on the machine changes little; their ratios are kept in
`results/time_exits.json`.
"""

import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.benchmarks.timing import provenance
from unified_mm.config import Config
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import default_config
from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.generate import TextWriter
from unified_mm.inference.sampling import sampling_arrays
from unified_mm.nn.unstack import unstack_layers
from unified_mm.parallel.sharding import without_names
from unified_mm.task import build_task

LAYERS, EXIT, WIDTH, VOCABULARY, TOKENS = 12, 6, 512, 4096, 32
WAYS = {"all layers": None, "forced at the exit": -1.0, "checked, none leaves": 2.0}
ROWS = (1, 8)
TURNS = 8


def model_with_exit():
    """Returns a task whose model has the shape that is timed, and its parameters by layer."""
    config = default_config()
    sizes = {"width": WIDTH, "layers": LAYERS, "heads": 8, "feed_forward": 4 * WIDTH}
    config.model.update({**sizes, "exits": (EXIT,)})
    config.model.modalities.text.vocabulary = VOCABULARY
    config.objectives.exits.weight = 1.0
    task = build_task(Config(config.to_dict()), TextTokenizer.train(["a red cube"] * 2, 300))
    params = without_names(jax.jit(task.init)(jax.random.key(0)))
    return task, unstack_layers(params)


def writing(task, params, rows, threshold):
    """Returns a call that writes the tokens after pictures that were read before."""
    model = task.model.with_options(unstacked=True).for_inference()
    view = next(each.view for each in task.objectives if each.name == "captioning")
    writer = TextWriter(model, view, task.tokenizer.pad_id, TOKENS)
    batch = jax.tree.map(jnp.asarray, task.example_batch(rows))
    image = {**batch["image"], "present": jnp.ones(rows, bool)}
    text = {"ids": jnp.full((rows, 1), 2, jnp.int32), "valid": jnp.ones((rows, 1), bool)}
    text["present"] = jnp.ones(rows, bool)
    inputs = {
        "batch": {"image": image, "text": text},
        "max_tokens": jnp.full(rows, TOKENS),
        "stop": jnp.full((rows, 1), -1),
        "sampling": sampling_arrays(GREEDY, rows),
    }
    if threshold is not None:
        inputs["threshold"] = jnp.full(rows, threshold)
    state = jax.jit(writer.begin)(params, inputs)
    return partial(jax.jit(writer.generate), params, state)


def cpu_seconds(run):
    """Returns the CPU seconds that a call takes until its results are ready."""
    began = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - began


def main():
    """Prints each way's CPU seconds as a multiple of that of all layers."""
    task, params = model_with_exit()
    ratios = {}
    for rows in ROWS:
        runs = {name: writing(task, params, rows, each) for name, each in WAYS.items()}
        for run in runs.values():
            cpu_seconds(run)  # compiles
        took = [[cpu_seconds(run) for run in runs.values()] for _ in range(TURNS)]
        found = dict(zip(runs, np.median(took, axis=0).tolist(), strict=True))
        whole = found["all layers"]
        ratios[rows] = {name: round(each / whole, 3) for name, each in found.items()}
        ratios[rows]["tokens a CPU second, all layers"] = round(rows * (TOKENS - 1) / whole, 1)
    shape = {"layers": LAYERS, "exit": EXIT, "width": WIDTH, "vocabulary": VOCABULARY}
    print(json.dumps({"ratios by batch": ratios, **shape, **provenance()}))


if __name__ == "__main__":
    main()
