"""Table entries that families share: linear layers, norms, attention, transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unified_mm.nn.options import GateOptions, TransformerOptions
from unified_mm.pretrained.tables import (
    SAME,
    TRANSPOSED,
    Entry,
    Transform,
    into_heads,
    out_of_heads,
    repeated,
    reshaped,
)

# What they call an activation -> what we call it.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def activation(section: Any, key: str) -> str:
    """Returns our name for the activation at `key`.

    Raises:
      ValueError: if the activation is none of `ACTIVATIONS`; the message names it.
    """
    name = section[key]
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{section.where}: {key}={name!r} is none of {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]


def main_options(model: Mapping[str, Any]) -> TransformerOptions:
    """Returns the options of the main stack of `config.model`.

    They include the gated cross-attention layers where the fusion has them.
    """
    options = TransformerOptions.from_config(model)
    if model["fusion"] != "gated_cross_attention":
        return options
    return replace(options, cross=GateOptions(**model["cross"]))


def tower_options(model: Mapping[str, Any]) -> TransformerOptions:
    """Returns the options of the towers of `config.model`, which encode the context."""
    return TransformerOptions.from_config(model).changed(model["tower"])


def line(theirs: str, ours: str, transform: Transform = SAME) -> Entry:
    """Returns the entry of one tensor that becomes one parameter."""
    return Entry((theirs,), (ours,), transform)


def dense(theirs: str, ours: str, bias: bool) -> list[Entry]:
    """Returns the entries of a linear layer without heads."""
    found = [line(f"{theirs}.weight", f"{ours}/kernel", TRANSPOSED)]
    return found + [line(f"{theirs}.bias", f"{ours}/bias")] * bias


def norm(theirs: str, ours: str, kind: str = "layer") -> list[Entry]:
    """Returns the entries of a layer norm, or of an RMS norm, which has no bias."""
    found = [line(f"{theirs}.weight", f"{ours}/scale")]
    return found + [line(f"{theirs}.bias", f"{ours}/bias")] * (kind == "layer")


def attention(
    theirs: Mapping[str, str], ours: Mapping[str, str], options: TransformerOptions
) -> list[Entry]:
    """Returns the entries of the four projections of attention.

    Args:
      theirs: names of their modules, by 'query', 'key', 'value' and 'output'.
      ours: paths of our modules, by the same keys.
      options: options of the stack: heads, their width, and which projections have a bias.
    """
    found = []
    for name, heads in (
        ("query", options.heads),
        ("key", options.num_kv_heads),
        ("value", options.num_kv_heads),
    ):
        width = options.head_dim
        found.append(
            line(f"{theirs[name]}.weight", f"{ours[name]}/kernel", into_heads(heads, width))
        )
        if options.query_bias:
            shape = reshaped((heads * width,), (heads, width))
            found.append(line(f"{theirs[name]}.bias", f"{ours[name]}/bias", shape))
    turned = out_of_heads(options.heads, options.head_dim)
    found.append(line(f"{theirs['output']}.weight", f"{ours['output']}/kernel", turned))
    if options.output_bias:
        found.append(line(f"{theirs['output']}.bias", f"{ours['output']}/bias"))
    return found


PROJECTIONS = ("query", "key", "value", "output")
OUR_ATTENTION = {name: f"attention/{name}/shared" for name in PROJECTIONS}


def blocks(
    theirs: str, ours: str, names: Mapping[str, str], options: TransformerOptions
) -> list[Entry]:
    """Returns the entries of a whole stack of blocks.

    Args:
      theirs: prefix of one of their layers, with `{layer}` for its number.
      ours: prefix of our stack.
      names: their module for each of 'query', 'key', 'value', 'output', 'attention_norm',
        'feed_forward_norm', 'up', 'down', and 'gate' where the feed-forward has one.
      options: options of the stack.
    """
    found = attention(names, OUR_ATTENTION, options)
    for place in ("attention_norm", "feed_forward_norm"):
        found += norm(names[place], place, options.norm)
    for place in ("up", "down", *(["gate"] if options.gated_feed_forward else [])):
        found += dense(names[place], f"feed_forward/mlp/shared/{place}", options.feed_forward_bias)
    per_period = options.blocks_per_period
    return repeated(found, theirs, f"{ours}/layers/block_{{block}}", options.layers, per_period)


# Blocks of CLIP, SigLIP and the vision model of IDEFICS.
CLIP_BLOCK = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "feed_forward_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
# Blocks of Llama, Qwen 2 and the language model of IDEFICS.
LLAMA_BLOCK = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
