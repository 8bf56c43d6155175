"""The residual stream for whoever wants to look at it; models leave none of it otherwise.

`model.apply(..., mutable=["residual"])` asks for it. Each stack then leaves what goes into its
first layer and what comes out of each (Elhage et al. 2021, "A mathematical framework for
transformer circuits", call this sum of all layers' outputs the residual stream).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from unified_mm.models.layers_apart import LAYERS, layers_stacked
from unified_mm.models.options import TransformerOptions

RESIDUAL = "residual"  # the collection
EMBEDDED = "embedded"


def leave_stream(module: nn.Module, name: str, x: Float[Array, "B N D"]) -> None:
    """Leaves the stream in a module's collection under a name, where someone asked."""
    if module.is_initializing() or not module.is_mutable_collection(RESIDUAL):
        return
    module.sow(RESIDUAL, name, x)


def layer_names(options: TransformerOptions) -> list[str]:
    """Names of what a stack leaves, in order.

    'embedded', then 'layer_0', 'layer_1', ...; a gated cross layer before the blocks of period p
    is 'cross_p'.
    """
    names = [EMBEDDED]
    for period in range(options.periods):
        if options.cross.every:
            names.append(f"cross_{period}")
        first = period * options.blocks_a_period
        names += [f"layer_{first + number}" for number in range(options.blocks_a_period)]
    return names


def streams_by_layer(
    left: Mapping[str, Any], stack: str, options: TransformerOptions
) -> dict[str, Float[Array, "B N D"]]:
    """What one stack left in the collection, by `layer_names`.

    Args:
      left: the collection.
      stack: name of the stack in the parameter tree: 'transformer', 'towers_image'.
      options: of the stack.
    """
    found = layers_stacked({stack: left[stack]})[stack]
    streams = [found[EMBEDDED][0]]
    for period in range(options.periods):
        # A scan stacks what its periods leave: each has its own row. Flax keeps it in a tuple.
        if options.cross.every:
            streams.append(found[LAYERS]["after_cross"][0][period])
        for number in range(options.blocks_a_period):
            streams.append(found[LAYERS][f"after_block_{number}"][0][period])
    return dict(zip(layer_names(options), streams, strict=True))
