"""Parameters of scanned stacks, split by layer for inference.

A program copies each layer that it takes out of stacked parameters. In training this costs little
compared with the products with a whole batch; where a step reads every weight for one token per
example, it costs as much as the step itself (on a CPU, half of the time at batch 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

LAYERS = "layers"


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with each `layers` [periods, ...] as `layers_0`, `layers_1`, ..."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        if name == LAYERS:
            for number, layer in enumerate(apart(value)):
                found[f"{LAYERS}_{number}"] = layer
        else:
            found[name] = unstack_layers(value) if isinstance(value, Mapping) else value
    return found


@jax.jit  # one program, where each slice would be one by itself
def apart(stacked: Any) -> list[Any]:
    """Returns each layer of parameters [periods, ...]."""
    count = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda x, i=number: x[i], stacked) for number in range(count)]


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `unstack_layers`."""
    found: dict[str, Any] = {}
    layers: dict[int, Any] = {}
    for name, value in params.items():
        if number := re.fullmatch(rf"{LAYERS}_(\d+)", name):
            layers[int(number[1])] = value
        else:
            found[name] = stack_layers(value) if isinstance(value, Mapping) else value
    if layers:
        in_order = [layers[number] for number in sorted(layers)]
        found[LAYERS] = jax.tree.map(lambda *each: jnp.stack(each), *in_order)
    return found
