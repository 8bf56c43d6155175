"""Counts the way of a newcomer: `python tests/trip.py`, files and functions of the package entered.

Three ways on the task of `tests/tiny.py` (early fusion, contrast and captioning): from arrays to
the loss, from a config to the shardings of all parameters, and from a plan of attention to a mask.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import tiny  # noqa: E402

from unified_mm.config import Config  # noqa: E402
from unified_mm.nn.attention.attention import plan_attention  # noqa: E402
from unified_mm.nn.attention.rules import MaskTable, View  # noqa: E402
from unified_mm.parallel.mesh import make_mesh  # noqa: E402
from unified_mm.parallel.sharding import param_shardings  # noqa: E402
from unified_mm.task import build_task  # noqa: E402

PACKAGE = str(ROOT / "unified_mm")
CHANGES = {"objectives__matching__weight": 0.0}


def entered(work: Callable[[], Any]) -> dict[str, set[str]]:
    """Returns the functions that `work` enters, by file of the package."""
    found: dict[str, set[str]] = {}

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
            if "<" not in code.co_name:  # no comprehensions and lambdas
                file = os.path.relpath(code.co_filename, PACKAGE)
                found.setdefault(file, set()).add(name)

    sys.setprofile(note)
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
    trip("arrays to loss", lambda: task.metrics(params, batch, key, deterministic=True))


def shardings() -> None:
    """Lays out the parameters of a config."""
    config = Config(tiny.config_dict(**CHANGES).to_dict())
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    tokenizer = tiny.tokenizer()

    def work() -> Any:
        return param_shardings(build_task(config, tokenizer).abstract_params(), mesh)

    trip("config to shardings", work)


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
    trip("plan to mask", lambda: plan_attention(options, table, held[0], held[0]))


def trip(name: str, work: Callable[[], Any]) -> None:
    """Prints what a way enters."""
    found = entered(work)
    functions = sum(map(len, found.values()))
    print(f"{name}: {len(found)} files, {functions} functions")
    for file, names in sorted(found.items()):
        lines = len((Path(PACKAGE) / file).read_text().splitlines())
        print(f"  {file} ({lines} lines): {', '.join(sorted(names))}")


if __name__ == "__main__":
    loss()
    shardings()
    mask()
