"""Counts the way of a newcomer: `python tests/trip.py`, files and functions of the package entered.

Four ways on the task of `tests/tiny.py` (early fusion, contrast and captioning): from arrays to
the loss, from a config to the shardings of all parameters, from a plan of attention to a mask, and
from a config to the sharding of one kernel.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import tiny  # noqa: E402

from unified_mm.config import Config  # noqa: E402
from unified_mm.nn.attention.attention import plan_attention  # noqa: E402
from unified_mm.nn.attention.rules import MaskTable, View  # noqa: E402
from unified_mm.parallel.mesh import make_mesh  # noqa: E402
from unified_mm.parallel.sharding import param_shardings, shardings_of  # noqa: E402
from unified_mm.task import build_task  # noqa: E402

PACKAGE = str(ROOT / "unified_mm")
CHANGES = {"objectives__matching__weight": 0.0}
KERNEL = "transformer/layers/block_0/feed_forward/mlp/shared/up/kernel"
Found = dict[str, set[str]]  # functions by file


def add(found: Found, frame: Any) -> None:
    """Adds the function of a frame, if it is of the package and has a name."""
    code = frame.f_code
    if code.co_filename.startswith(PACKAGE) and "<" not in code.co_name:
        name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
        found.setdefault(os.path.relpath(code.co_filename, PACKAGE), set()).add(name)


def entered(work: Callable[[], Any]) -> Found:
    """Returns the functions that `work` enters, by file of the package."""
    found: Found = {}
    sys.setprofile(lambda frame, event, _: add(found, frame) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def loss() -> None:
    """Traces the losses of a batch."""
    task = tiny.task(**CHANGES)
    params, batch = tiny.params(task), tiny.batch(task)
    key = jax.random.key(0)
    work = entered(lambda: task.metrics(params, batch, key, deterministic=True))
    trip("arrays to loss", work)


def shardings() -> None:
    """Lays out the parameters of a config."""
    config = Config(tiny.config_dict(**CHANGES).to_dict())
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    tokenizer = tiny.tokenizer()

    def work() -> Any:
        return param_shardings(build_task(config, tokenizer).abstract_params(), mesh)

    trip("config to shardings", entered(work))


def mask() -> None:
    """Plans attention over a picture and a text."""
    task = tiny.task(**CHANGES)
    params, batch = tiny.params(task), tiny.batch(task)
    held: list[Any] = []

    def embed(model: Any) -> Any:
        held.append(model.embed_text(batch["text"], "t").metadata)
        return held[-1].valid

    task.model.apply({"params": params}, method=embed)
    table = MaskTable((View("t", "prefix"),))
    options = task.model.options
    work = entered(lambda: plan_attention(options, table, held[0], held[0]))
    trip("plan to mask", work)


def kernel() -> None:
    """Declares one kernel and gives it its sharding: the functions in progress, then entered."""
    task = build_task(Config(tiny.config_dict(**CHANGES).to_dict()), tiny.tokenizer())
    found: Found = {}
    declare = nn.Module.param

    def noted(module: Any, name: str, *rest: Any, **more: Any) -> Any:
        if "/".join((*module.path, name)) == KERNEL:
            frame: Any = sys._getframe(1)
            while frame is not None:
                add(found, frame)
                frame = frame.f_back
        return declare(module, name, *rest, **more)

    with mock.patch.object(nn.Module, "param", noted):
        params = task.abstract_params()
    if not found:
        raise ValueError(f"there is no {KERNEL}")
    node = params
    for name in KERNEL.split("/"):
        node = node[name]
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    for file, names in entered(lambda: shardings_of({KERNEL: node}, mesh)).items():
        found.setdefault(file, set()).update(names)
    trip("config to one kernel's sharding", found)


def trip(name: str, found: Found) -> None:
    """Prints the functions of a way."""
    functions = sum(map(len, found.values()))
    print(f"{name}: {len(found)} files, {functions} functions")
    for file, names in sorted(found.items()):
        lines = len((Path(PACKAGE) / file).read_text().splitlines())
        print(f"  {file} ({lines} lines): {', '.join(sorted(names))}")


if __name__ == "__main__":
    loss()
    shardings()
    mask()
    kernel()
