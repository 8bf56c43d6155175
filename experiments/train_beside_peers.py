"""A training step of `tiny` on a CPU: this package against PyTorch, with and without huge pages.

    pip install '.[parity]'
    python -m experiments.train_beside_peers [--before=../before]

All train early fusion of the same shapes on the same ready batches: one pass over [image | text of
contrast | text of captioning], softmax contrast and next tokens, AdamW, the norm of gradients
clipped, float32, as many threads. PyTorch attends by its own fused function, part by part as we do.
Each is a process of its own; they take turns of a few steps, so that other load on the machine
slows all, and the ratio of a turn counts: to PyTorch without and with huge pages. Another checkout
of this package takes its turns too, with its own recipe of the same shapes, and the losses of its
first steps must be ours. Run it on idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from unified_mm.config import Config
from unified_mm.files import read_json, write_json

HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
BATCHES = 4
SAME = 20  # steps whose losses another checkout must have
LEARNED = ("contrastive", "captioning")  # PyTorch's side adds up these losses
RECIPE = "experiments/recipe.py:tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12, help="of each, alternating")
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--before", type=Path, help="another checkout of this package")
    parser.add_argument(
        "--before-recipe", default="configs/coco.py:tiny", help="its recipe of the same shapes"
    )
    parser.add_argument("--replace", action="store_true", help="overwrite what was kept before")
    parser.add_argument("--work", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        with redirect_stdout(sys.stderr):  # what is said on the way is no answer
            step = WORKERS[args.work](args)
        serve(step, SAME)
        return
    from experiments.keep import new_result
    from unified_mm.benchmarks.timing import provenance

    target = new_result("train_beside_peers", replace=args.replace)
    with tempfile.TemporaryDirectory() as folder:
        rows = in_turns(args, Path(folder))
    for name, row in rows.items():
        print(f"{name:<28}{json.dumps(row)}")
    write_json(target, {"turns": args.turns, "steps": args.steps, "rows": rows, **provenance()})


def in_turns(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Starts a worker for each way to train, lets them take turns, and returns a row for each."""
    kinds = ["ours", "torch", *(["torch_compiled"] if args.compiled else [])]
    kinds += ["before"] if args.before else []
    workers = {}
    losses = {}
    for kind in kinds:  # ours comes first: it writes the batches
        for name, more in ((kind, {}), (f"{kind}, huge pages", HUGE)):
            workers[name] = start(kind, args, folder, more)
            losses[name] = read(workers[name])["losses"]
    if args.before:
        same_losses(losses["ours"], losses["before"])
    turns: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(args.turns):
        order = list(workers) if turn % 2 == 0 else list(workers)[::-1]
        for name in order:
            turns[name].append(statistics.median(ask(workers[name], args.steps)["seconds"]))
    rows = {}
    for name, worker in workers.items():
        rows[name] = {**rates(turns, name), **ask(worker, 0)}
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return rows


def start(
    kind: str, args: argparse.Namespace, folder: Path, more: Mapping[str, str]
) -> subprocess.Popen[str]:
    """Starts a worker, in the checkout that it measures."""
    place = args.before.resolve() if kind == "before" else Path(__file__).parents[1]
    own = [f"--work={kind}", f"--batches={folder}", f"--before-recipe={args.before_recipe}"]
    kept = {key: value for key, value in os.environ.items() if key not in HUGE}
    return subprocess.Popen(
        [sys.executable, __file__, *own],
        cwd=place, env={**kept, **more, "PYTHONPATH": str(place)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def same_losses(ours: list[float], before: list[float]) -> None:
    """Checks that two checkouts train alike.

    Raises:
      ValueError: a loss differs by more than a ten-thousandth.
    """
    for step, (a, b) in enumerate(zip(ours, before, strict=True)):
        if abs(a - b) <= 1e-4 * abs(b):  # which is not so of a loss that is no number
            continue
        raise ValueError(
            f"step {step} has a loss of {a} here and of {b} there: the two "
            "do not train alike, so their speeds say nothing; give --before-recipe the same "
            f"shapes as {RECIPE}"
        )


def rates(turns: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    """Returns the speed of one way to train, alone and as a multiple of its peers' in each turn."""
    found: dict[str, Any] = {"steps_per_second": round(1 / statistics.median(turns[name]), 3)}
    peers = {"torch": "torch", "torch_with_huge_pages": "torch, huge pages", "before": "before"}
    peers["before_with_huge_pages"] = "before, huge pages"
    for key, peer in peers.items():
        if peer not in turns:
            continue
        ratios = [b / a for a, b in zip(turns[name], turns[peer], strict=True)]
        found[f"times_{key}"] = round(statistics.median(ratios), 3)
        found[f"times_{key}_least_most"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return found


def ask(worker: subprocess.Popen[str], steps: int) -> Any:
    """Lets a worker do steps and returns what it says; after 0 steps, about itself."""
    assert worker.stdin is not None
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    return read(worker)


def read(worker: subprocess.Popen[str]) -> Any:
    """Returns the next line of a worker as JSON."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with exit code {worker.wait()}: its error is above")
    return json.loads(line)


def serve(step: Callable[[], float], before: int = 3) -> None:
    """Does as many steps as each line of the input says, and prints the seconds of each.

    Args:
      step: does a step and returns its loss.
      before: steps that are not timed; their losses are printed first.
    """
    first = [step() for _ in range(before)]
    print(json.dumps({"losses": first}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        about = {"resident_bytes": resident, "first_losses": first}
        print(json.dumps({"seconds": seconds} if seconds else about), flush=True)


def before(args: argparse.Namespace) -> Callable[[], float]:
    """Returns a step of the checkout that this process stands in.

    Raises:
      SystemExit: there is no checkout.
    """
    import unified_mm
    from unified_mm.benchmarks.training import Step

    if Path.cwd() not in Path(str(unified_mm.__file__)).resolve().parents:
        raise SystemExit(f"{Path.cwd()} is no checkout: {unified_mm.__file__} would be measured")
    return Step(prepared(args.before_recipe), BATCHES).loss


def ours(args: argparse.Namespace) -> Callable[[], float]:
    """Returns a step of ours on the first batches of the recipe, which it writes as files."""
    from unified_mm.benchmarks.training import Step
    from unified_mm.training.loop import phase_batches

    setup, folder = prepared(), args.batches
    with closing(phase_batches(setup, setup.phases[0], 0)) as batches:  # type: ignore[type-var]
        for number in range(BATCHES):
            image, text = (next(batches)[name] for name in ("image", "text"))
            np.savez(folder / f"{number}.npz", pixels=image["pixels"], **text)
    embedder = setup.task.modalities["text"].embedder(1, np.float32)
    Shape.of(setup.config, embedder.embedding.vocabulary).write(folder)
    return Step(setup, BATCHES).loss


def prepared(recipe: str = RECIPE) -> Any:
    """Returns the setup of a recipe's training."""
    try:
        from unified_mm.cli.recipes import recipe_config
    except ImportError:  # an older checkout
        from unified_mm.recipes import recipe_config  # type: ignore[import-not-found,no-redef]
    from unified_mm.runs.folder import RunFolder
    from unified_mm.training.setup import prepare

    with tempfile.TemporaryDirectory() as folder:
        config = Config(recipe_config(recipe).to_dict())
        return prepare(config, RunFolder(folder), lambda line: None)


def theirs(args: argparse.Namespace, compiled: bool = False) -> Callable[[], float]:
    """Returns a step of PyTorch's on the batches that ours wrote."""
    import torch

    torch.manual_seed(0)
    folder = args.batches
    model = early_fusion(Shape.read(folder))
    run = torch.compile(model) if compiled else model
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98))
    batches = cycle([load_batch(folder / f"{number}.npz") for number in range(BATCHES)])

    def step() -> float:
        optimizer.zero_grad()
        loss = run(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def load_batch(file: Path) -> tuple[Any, Any, Any]:
    """Returns pixels, token ids and which of these are valid, as tensors."""
    import torch

    arrays = np.load(file)
    return tuple(torch.from_numpy(arrays[name]) for name in ("pixels", "ids", "valid"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Shape:
    """The shape of early fusion.

    Attributes:
      vocabulary: tokens that have embeddings.
      width, heads, hidden, layers: of the transformer.
      patches, patch: of a picture, and pixels on a side of each.
      hierarchical: whether a patch passes through an MLP of its parts, not one dense map.
      length: tokens of a text.
      space: width of the space of contrast.
    """

    vocabulary: int
    width: int
    heads: int
    hidden: int
    layers: int
    patches: int
    patch: int
    hierarchical: bool
    length: int
    space: int

    @classmethod
    def of(cls, config: Config, vocabulary: int) -> Shape:
        """Returns the shape that a config has.

        Raises:
          ValueError: PyTorch's side does not train what the config asks for.
        """
        asked = {
            "model.fusion": (config.model.fusion, "early"),
            "train.optimizer": (config.train.optimizer, "adamw"),
            **{
                f"objectives.{name}.weight": (each["weight"], float(name in LEARNED))
                for name, each in config.objectives.items()
            },
        }
        for field, (value, there) in asked.items():
            if value != there:
                raise ValueError(
                    f"{field}={value!r}: PyTorch's side trains with {there!r}; compare a recipe "
                    f"that does too, such as {RECIPE}"
                )
        image, text = config.model.modalities.image, config.model.modalities.text
        return cls(
            vocabulary=vocabulary,
            width=config.model.width,
            heads=config.model.heads,
            hidden=config.model.feed_forward,
            layers=config.model.layers,
            patches=(config.data.image_size // image.patch) ** 2,
            patch=image.patch,
            hierarchical=image.stem == "hierarchical",
            length=text.length,
            space=config.objectives.contrastive.width,
        )

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """Reads what `write` wrote."""
        return cls(**read_json(folder / "shape.json"))

    def write(self, folder: Path) -> None:
        """Writes the shape beside the batches."""
        write_json(folder / "shape.json", asdict(self))


def early_fusion(shape: Shape, *, half: bool = False, flash: bool = False) -> Any:
    """Returns early fusion with both losses as a module of PyTorch.

    Args:
      shape: of the model.
      half: whether the residual stream is bfloat16, for `torch.autocast`.
      flash: whether captions see in order by what flash attention has, not by a mask: what pads a
        text comes after it, where no token of the text looks.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.attention.bias import causal_lower_right

    width, heads, layers = shape.width, shape.heads, shape.layers
    hidden, patches, length = shape.hidden, shape.patches, shape.length

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-6) for _ in range(2)])
            self.query, self.key, self.value, self.output = (
                nn.Linear(width, width) for _ in range(4)
            )
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

        def forward(self, x: Any, masks: Any) -> Any:
            y = self.norms[0](x)
            query, key, value = (
                dense(y).unflatten(2, (heads, -1)).transpose(1, 2)
                for dense in (self.query, self.key, self.value)
            )
            # The image sees itself, the text of contrast too, that of captioning itself and images.
            parts = (each.split([patches, length, length], 2) for each in (query, key, value))
            (q_image, q_pair, q_text), (k_image, k_pair, k_text), (v_image, v_pair, v_text) = parts
            attend = F.scaled_dot_product_attention
            keys, values = torch.cat([k_image, k_text], 2), torch.cat([v_image, v_text], 2)
            seen = [
                attend(q_image, k_image, v_image),
                attend(q_pair, k_pair, v_pair, masks[0]),
                attend(q_text, keys, values, masks[1]),
            ]
            x = x + self.output(torch.cat(seen, 2).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))

    class EarlyFusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stem = [(4, 48, width // 2), (shape.patch // 4, width * shape.patch**2 // 32, width)]
            if not shape.hierarchical:
                stem = [(shape.patch, 3 * shape.patch**2, width)]
            self.stem_sizes = [size for size, *_ in stem]
            self.stem = nn.ModuleList([nn.Linear(into, out) for _, into, out in stem])
            self.tokens = nn.Parameter(torch.randn(shape.vocabulary, width) * width**-0.5)
            self.places = nn.Parameter(0.1 * torch.randn(patches + length, width))
            self.blocks = nn.ModuleList([Block() for _ in range(layers)])
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.of_image, self.of_text = (
                nn.Linear(width, shape.space, bias=False) for _ in range(2)
            )
            self.log_scale = nn.Parameter(torch.tensor(2.66))

        def embed_image(self, pixels: Any) -> Any:
            x = pixels.float() / 127.5 - 1
            for number, (dense, size) in enumerate(zip(self.stem, self.stem_sizes, strict=True)):
                x = F.gelu(x, approximate="tanh") if number else x
                x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
                x = dense(x.transpose(2, 3).flatten(3))
            return x.flatten(1, 2)

        def forward(self, pixels: Any, ids: Any, valid: Any) -> Any:
            text = F.embedding(ids, self.tokens) * width**0.5 + self.places[patches:]
            text = text * valid[..., None]
            x = torch.cat([self.embed_image(pixels) + self.places[:patches], text, text], 1)
            own = valid[:, None, None]
            order = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            both = F.pad(order, (patches, 0), value=True)
            both = both & F.pad(valid, (patches, 0), value=True)[:, None, None]
            x = x.bfloat16() if half else x
            if flash:
                both = causal_lower_right(length, patches + length)
            for block in self.blocks:
                x = block(x, (own, both))
            x = self.norm(x)
            image, contrast, caption = x.split([patches, length, length], 1)
            weights = valid[..., None].float()
            vectors = [
                F.normalize(self.of_image(image.mean(1)), dim=-1),
                F.normalize(self.of_text((contrast * weights).sum(1) / weights.sum(1)), dim=-1),
            ]
            scores = self.log_scale.exp() * vectors[0] @ vectors[1].T
            right = torch.arange(len(scores), device=ids.device)
            pairs = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
            logits = (caption @ self.tokens.T)[:, :-1].flatten(0, 1)
            asked = ids[:, 1:].long().masked_fill(~valid[:, 1:], -100).flatten()
            return pairs + F.cross_entropy(logits, asked)

    return EarlyFusion()


WORKERS: dict[str, Callable[[argparse.Namespace], Callable[[], float]]] = {
    "ours": ours,
    "before": before,
    "torch": theirs,
    "torch_compiled": partial(theirs, compiled=True),
}


if __name__ == "__main__":
    main()
