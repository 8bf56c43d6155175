"""Greedy decoding of a GPT-2 model: this package against Hugging Face's `generate`, on one CPU.

    pip install '.[parity]'
    python -m experiments.generate_beside_transformers

Both have the same random weights (width 512, 6 layers, 8 heads, 32,000 tokens, float32), read the
same 16 tokens and generate 64 more, which have to be the same ones. They take turns in one process,
so that other load on the machine slows both; the median of the turns counts. Run it on idle cores:
torch's threads wait for one another, and lose more where cores are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import unified_mm
from experiments.keep import new_result
from unified_mm.benchmarks.timing import provenance, times_of
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.files import write_json
from unified_mm.import_weights import import_directory, write_run
from unified_mm.inference.decoding import GREEDY
from unified_mm.inference.loaded import LoadedModel
from unified_mm.inference.sampling import sampling_arrays

SHAPE: dict[str, Any] = {
    "n_embd": 512,
    "n_layer": 6,
    "n_head": 8,
    "vocab_size": 32_000,
    "n_positions": 128,
}
PROMPT, NEW = 16, 64
THEIRS = ("torch", "transformers")
Generate = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=15, help="of each, alternating")
    parser.add_argument("--replace", action="store_true", help="overwrite what was kept before")
    args = parser.parse_args()
    target = new_result("generate_beside_transformers", replace=args.replace)
    theirs = their_model()
    ours = as_run_of_ours(theirs)
    rows = [compare(ours, theirs, batch, args.turns) for batch in args.batches]
    origin = provenance()
    result = {
        "shape": SHAPE,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rows": rows,
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "load": round(os.getloadavg()[0], 1),  # 1 or less: nothing else ran
        **origin,
        "versions": origin["versions"] | {name: metadata.version(name) for name in THEIRS},
    }
    write_json(target, result)
    print(f"kept {target}")
    print(json.dumps(rows))


def their_model() -> Any:
    """Returns a GPT-2 with random weights, larger than usual so that the tokens differ."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPE, bos_token_id=1, eos_token_id=2)
    config.initializer_range = 0.1
    return transformers.GPT2LMHeadModel(config).eval()


def as_run_of_ours(theirs: Any) -> LoadedModel:
    """Returns the model with the same weights in this package, by way of `import_weights`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpt2"
        theirs.save_pretrained(path)
        TextTokenizer.train(["any text will do"], 300).save(path / "tokenizer.json")
        names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        write_json(path / "tokenizer_config.json", names)
        run = write_run(import_directory(path), Path(folder) / "run")
        return unified_mm.load(run.path)


def compare(ours: LoadedModel, theirs: Any, batch: int, turns: int) -> dict[str, Any]:
    """Times both in turns on one batch of prompts, and returns the rates and their ratio.

    Raises:
      AssertionError: if the tokens differ.
    """
    rng = np.random.default_rng(batch)
    prompts = rng.integers(3, SHAPE["vocab_size"], (batch, PROMPT)).astype(np.int32)
    asked: dict[str, Generate] = {"ours": our_generate(ours), "theirs": their_generate(theirs)}
    written = {name: function(prompts) for name, function in asked.items()}  # and compile
    np.testing.assert_array_equal(written["ours"], written["theirs"])
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(turns):
        for name in sorted(asked, reverse=bool(turn % 2)):
            seconds[name] += times_of(partial(asked[name], prompts), 1)
    row: dict[str, Any] = {
        "batch": batch,
        "turns": turns,
        "different_tokens": len(np.unique(written["ours"])),
    }
    for name, each in seconds.items():
        median = statistics.median(each)
        row[f"{name}_tokens_per_second"] = round(batch * NEW / median, 1)
        row[f"{name}_seconds"] = [round(value, 4) for value in sorted(each)]
    row["ratio"] = round(row["ours_tokens_per_second"] / row["theirs_tokens_per_second"], 3)
    print(json.dumps(row))
    return row


def our_generate(model: LoadedModel) -> Generate:
    """Returns a compiled function from prompts [B, T] to the generated tokens [B, S]."""
    predictor = model.predictor
    writer = replace(predictor.writer(NEW), padding=0)

    def run(params: Any, inputs: Any) -> Any:
        return writer.generate(params, writer.begin(params, inputs)).written

    def write(prompts: np.ndarray) -> np.ndarray:
        rows = len(prompts)
        text = {
            "ids": prompts,
            "valid": np.ones(prompts.shape, bool),
            "present": np.ones(rows, bool),
        }
        inputs = {
            "batch": {"text": text},
            "sampling": sampling_arrays(GREEDY, rows, 0),
            "max_tokens": np.full(rows, NEW, np.int32),
            "stop": np.full((rows, 1), -1, np.int32),  # nothing ends a text
        }
        return np.asarray(predictor.call("beside", run, predictor.to_device(inputs)))

    return write


def their_generate(model: Any) -> Generate:
    """Returns the same function by Hugging Face's `generate`, greedy and with its cache."""

    def write(prompts: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(prompts.astype(np.int64))
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=NEW,
                pad_token_id=0,
                eos_token_id=None,
            )
        return whole[:, PROMPT:].numpy()

    return write


if __name__ == "__main__":
    main()
