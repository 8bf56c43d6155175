"""FLOPs of attention kernels, whose products a traced program does not show as such."""

from __future__ import annotations

import math
from typing import Any

# Products of queries x keys x width in cuDNN's kernels: two forward; five backward, which computes
# the scores again (Dao et al. 2022, algorithm 4).
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def cudnn_flops(equation: Any) -> int:
    """Returns the FLOPs of an equation that is cuDNN's attention, else 0; a mask saves nothing."""
    products = CUDNN.get(equation.primitive.name, 0)
    if not products:
        return 0
    query, key = (each.aval.shape for each in equation.invars[:2])
    batch, queries, heads, width = query
    return 2 * products * batch * heads * queries * key[1] * width


def repeats(equation: Any) -> int:
    """Returns how often an equation runs the programs within it, all devices together.

    A scan runs as often as it is long, a Pallas kernel once for each point of its grid, and a
    `shard_map` on each device.
    """
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        # `manual_axes` in some versions of jax, `newly_manual_axes` in others.
        axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1
