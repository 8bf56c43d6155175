"""`large` trained by this package and by PyTorch, a turn each on one card."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from experiments.accelerator.scale import (
    FULL,
    SHRUNK,
    Scale,
    Setting,
    config_of,
    largest_batch,
)
from experiments.accelerator.schedule import Row, Rows
from experiments.train_beside_peers import Shape, ask, early_fusion, read, serve
from unified_mm.costs.memory_share import with_share
from unified_mm.files import read_json, write_json

# Of the card's memory: the rest is PyTorch's, which takes what it needs.
OURS = 0.35
BATCHES = 2
ATTENDS = re.compile("flash|fmha|dot_product|efficient_attention", re.IGNORECASE)


def turns(setting: Setting) -> Rows:
    """Returns the row of both in turns, at the largest batch that fits into our share."""
    scale, results, work = setting.scale, setting.results, setting.work

    def measure() -> Row:
        folder = work / "turns"
        folder.mkdir(parents=True, exist_ok=True)
        memory = results.rows("large")["memory"]
        batch = largest_batch(memory, OURS * memory["memory_bytes"], scale)
        workers: dict[str, subprocess.Popen[str]] = {}
        try:
            workers["ours"] = start("ours", folder, batch, scale)
            read(workers["ours"])  # it wrote the batches
            workers["torch"] = start("torch", folder, batch, scale)
            first = {kind: read(worker)["losses"] for kind, worker in workers.items()}
            taken: dict[str, list[float]] = {kind: [] for kind in workers}
            for turn in range(scale.turns):
                for kind in list(workers)[:: 1 if turn % 2 == 0 else -1]:
                    taken[kind].append(statistics.fmean(ask(workers[kind], scale.steps)["seconds"]))
        finally:
            for worker in workers.values():
                worker.kill()
        ratios = [b / a for a, b in zip(taken["ours"], taken["torch"], strict=True)]
        rates = {kind: batch / statistics.median(seconds) for kind, seconds in taken.items()}
        return {
            "batch": batch,
            "times_torch": round(statistics.median(ratios), 3),
            "times_torch_least_most": [round(min(ratios), 3), round(max(ratios), 3)],
            **{f"{kind}_samples_per_second": round(rate, 1) for kind, rate in rates.items()},
            "first_losses": first,
            "about_torch": read_json(folder / "torch.json"),
        }

    return {"turns": measure}


def start(kind: str, folder: Path, batch: int, scale: Scale) -> subprocess.Popen[str]:
    """Starts a worker, whose protocol is that of `train_beside_peers.serve`."""
    shrunk = [] if scale == FULL else ["--shrunk"]
    return subprocess.Popen(
        [sys.executable, "-m", __name__, kind, str(folder), str(batch), *shrunk],
        env=with_share(os.environ, OURS),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ours(folder: Path, batch: int, scale: Scale) -> Callable[[], float]:
    """Returns a step of ours on random batches, which it writes as files."""
    from experiments.accelerator.trainer import Trainer
    from unified_mm.benchmarks.timing import fused_attention

    changes = {**scale.large, "train.batch_size": batch}
    config = config_of("large", changes, dtype="bfloat16", attention=fused_attention())
    trainer = Trainer(config, BATCHES)
    for number, arrays in enumerate(trainer.batches):
        text = arrays["text"]
        pixels = arrays["image"]["pixels"]
        np.savez(folder / f"{number}.npz", pixels=pixels, ids=text["ids"], valid=text["valid"])
    Shape.of(config, trainer.vocabulary).write(folder)
    print(json.dumps("wrote batches"), flush=True)  # theirs compiles beside ours
    trainer.begin()
    return trainer.loss


def theirs(folder: Path, batch: int, scale: Scale) -> Callable[[], float]:
    """Returns a step of PyTorch's on the batches that ours wrote, compiled, in bfloat16.

    Where its compiler refuses the order that flash attention has, captions see by a mask; which of
    the two it is, why, and the functions that attended, is written beside the batches.
    """
    import torch

    del batch, scale
    refused = ""
    try:
        step = torch_step(folder, flash=True)
        step()
    except (torch.cuda.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
        torch.compiler.reset()
        step = torch_step(folder, flash=False)
        step()
    with torch.profiler.profile() as profile:
        step()
    kernels = {each.key for each in profile.key_averages()}
    about = {
        "version": torch.__version__,
        "flash_refused": refused,
        "attended_by": sorted(name for name in kernels if ATTENDS.search(name)),
    }
    write_json(folder / "torch.json", about)
    return step


def torch_step(folder: Path, flash: bool) -> Callable[[], float]:
    """Returns a step of PyTorch's; `flash` is that of `early_fusion`."""
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A rehearsal traces and differentiates as a GPU's compiler does, and stops before C++.
    backend = "inductor" if device == "cuda" else "aot_eager"
    model = early_fusion(Shape.read(folder), half=True, flash=flash).to(device)
    run = torch.compile(model, backend=backend)
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), fused=True)
    batches = cycle([loaded(folder / f"{number}.npz", device) for number in range(BATCHES)])

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = run(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def loaded(file: Path, device: str) -> tuple[Any, ...]:
    """Returns pixels, token ids and which of these are valid, on a device."""
    import torch

    arrays = np.load(file)
    return tuple(torch.from_numpy(arrays[name]).to(device) for name in ("pixels", "ids", "valid"))


WORKERS = {"ours": ours, "torch": theirs}

if __name__ == "__main__":
    kind, folder, batch, *more = sys.argv[1:]
    serve(WORKERS[kind](Path(folder), int(batch), SHRUNK if more else FULL))
