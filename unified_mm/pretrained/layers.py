"""Table entries that families share: layers, attention, blocks, embeddings, image towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unified_mm.modalities.text import VOCABULARY_MULTIPLE
from unified_mm.nn.options import GateOptions, TransformerOptions
from unified_mm.pretrained.tables import (
    SAME,
    TRANSPOSED,
    Entry,
    Transform,
    first_and_grid,
    packed,
    padded_rows,
    rearranged,
    repeated,
)

LOG_SCALE = 2.6593  # ln(1 / 0.07): where CLIP's own starts
POSITION_IDS = {r"(.*\.)?embeddings\.position_ids": "the numbers 0, 1, 2 ..., not learned"}


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


def dense(theirs: str, ours: str, bias: bool, kernel: Transform = TRANSPOSED) -> list[Entry]:
    """Returns the entries of a linear layer without heads."""
    found = [line(f"{theirs}.weight", f"{ours}/kernel", kernel)]
    return found + [line(f"{theirs}.bias", f"{ours}/bias")] * bias


def norm(theirs: str, ours: str, kind: str = "layer") -> list[Entry]:
    """Returns the entries of a layer norm, or of an RMS norm, which has no bias."""
    found = [line(f"{theirs}.weight", f"{ours}/scale")]
    return found + [line(f"{theirs}.bias", f"{ours}/bias")] * (kind == "layer")


def attention(
    theirs: Mapping[str, str],
    ours: Mapping[str, str],
    width: int,
    *,
    query_bias: bool = False,
    output_bias: bool = False,
) -> list[Entry]:
    """Returns the entries of the four projections of attention.

    Args:
      theirs: names of their modules, by 'query', 'key', 'value' and 'output'. Where one tensor
        holds queries, keys and values one below the other, 'packed' is what its names begin with.
        'query_bias' and so on are biases that do not lie in their modules; '' for none.
      ours: paths of our modules, by the first four keys.
      width: A, the width of a head.
      query_bias: whether queries, keys and values have biases.
      output_bias: whether the output has a bias.
    """
    turned = rearranged("d (heads width)", "heads width d", width=width)
    found = dense(theirs["output"], ours["output"], output_bias, turned)
    leaves = {"weight": "kernel", "bias": "bias"} if query_bias else {"weight": "kernel"}
    for kind, leaf in leaves.items():
        more = " d" if leaf == "kernel" else ""
        if "packed" in theirs:
            sizes = {"parts": len(INPUTS), "width": width}
            apart = packed(f"(parts heads width){more}", f"parts{more} heads width", **sizes)
            paths = tuple(f"{ours[name]}/{leaf}" for name in INPUTS)
            found.append(Entry((f"{theirs['packed']}{kind}",), paths, apart))
            continue
        heads = rearranged(f"(heads width){more}", f"{more} heads width", width=width)
        tensors = {n: theirs.get(f"{n}_{kind}", f"{theirs[n]}.{kind}") for n in INPUTS}
        found += [line(x, f"{ours[name]}/{leaf}", heads) for name, x in tensors.items() if x]
    return found


def projections(inputs: str, output: str) -> dict[str, str]:
    """Returns the names of attention's four modules, by ours.

    Args:
      inputs: name of those of queries, keys and values, with `{name}` for 'query' and so on, or
        `{letter}` for 'q'.
      output: name of the fourth.
    """
    found = {name: inputs.format(name=name, letter=name[0]) for name in INPUTS}
    return {**found, "output": output}


INPUTS = ("query", "key", "value")
OUR_ATTENTION = projections("attention/{name}/shared", "attention/output/shared")


def blocks(
    theirs: str, ours: str, names: Mapping[str, str], options: TransformerOptions
) -> list[Entry]:
    """Returns the entries of a whole stack of blocks.

    Args:
      theirs: prefix of one of their layers, with `{layer}` for its number.
      ours: prefix of our stack.
      names: their module for each of 'query', 'key', 'value' and 'output', or as `attention` takes
        them, 'attention_norm', 'feed_forward_norm', 'up', 'down', 'gate' where the feed-forward
        has one, and 'query_norm', 'key_norm' where heads have them.
      options: options of the stack.
    """
    biases = {"query_bias": options.query_bias, "output_bias": options.output_bias}
    found = attention(names, OUR_ATTENTION, options.head_dim, **biases)
    for place in ("attention_norm", "feed_forward_norm"):
        found += norm(names[place], place, options.norm)
    if options.query_key_norm:
        for place in ("query_norm", "key_norm"):
            found += norm(names[place], f"attention/{place}", "rms")
    for place in ("up", "down", *(["gate"] if options.gated_feed_forward else [])):
        found += dense(names[place], f"feed_forward/mlp/shared/{place}", options.feed_forward_bias)
    per_period = options.blocks_per_period
    return repeated(found, theirs, f"{ours}/layers/block_{{block}}", options.layers, per_period)


def vocabulary(
    model: Mapping[str, Any], tokens: Sequence[str], scores: Sequence[str] = ()
) -> tuple[list[Entry], dict[str, str]]:
    """Returns the entries of the token embeddings, and the tensors that are copies of others.

    Args:
      model: `config.model`.
      tokens: names of their tables of embeddings, which become one.
      scores: names of the tables that score the next token, which may be the same ones.
    """
    text = model["modalities"]["text"]
    rows = padded_rows(text["vocabulary"], multiple=VOCABULARY_MULTIPLE)
    entries = [Entry(tuple(tokens), ("embedders_text/tokens",), rows)]
    if scores and text["head"] == "own":
        return [*entries, Entry(tuple(scores), ("embedders_text/scores",), rows)], {}
    return entries, dict(zip(scores, tokens, strict=False))


def patches(
    config: Mapping[str, Any], convolution: str, positions: str, class_token: str, batch: str = ""
) -> list[Entry]:
    """Returns the entries of the embeddings of images.

    Args:
      config: the whole config of the run; it says which of these parameters there are.
      convolution: name of the module that makes patches tokens.
      positions: name of the tensor of positions.
      class_token: name of the tensor of the class token, if there is one.
      batch: axes before those of these two tensors, as einops takes them: '1 '.
    """
    image, ours = config["model"]["modalities"]["image"], "embedders_image"
    side = config["data"]["image_size"] // image["patch"]
    pixels = rearranged(
        "d channels rows columns", "(rows columns channels) d", rows=image["patch"], channels=3
    )
    found = dense(convolution, f"{ours}/patches", image["bias"], pixels)
    if not image["class_token"]:
        grid = rearranged(f"{batch}(rows columns) d", "rows columns d", rows=side, columns=side)
        return [*found, line(positions, f"{ours}/positions", grid)]
    paths = (f"{ours}/class_position", f"{ours}/positions")
    return [
        *found,
        line(class_token, f"{ours}/class_token", rearranged(f"{batch}{batch}d", "d")),
        Entry((positions,), paths, first_and_grid(side, f"{batch}tokens d")),
    ]


def start_of_scale() -> dict[str, float]:
    """Returns where the scale of a tower's contrast with texts starts, which no weights have."""
    return {"heads_contrastive/log_scale": LOG_SCALE}


def start_of_tower(name: str, biased: bool = True) -> dict[str, float]:
    """Returns `start_of_scale`, and that of the biases of keys, which a tower does not have.

    Zero is what they are there: a bias of keys adds the same to all scores of a query, and changes
    nothing.
    """
    keys = {f"towers_{name}/layers/block_0/{OUR_ATTENTION['key']}/bias": 0.0}
    return start_of_scale() | (keys if biased else {})


def clip_tower(config: Mapping[str, Any], theirs: str) -> list[Entry]:
    """Returns the entries of the image tower of CLIP and of those built like it.

    Args:
      config: the whole config of the run.
      theirs: what the names of the tower's tensors begin with, such as 'vision_model.' or ''.
    """
    options = tower_options(config["model"])
    before = f"{theirs}embeddings"
    found = patches(
        config,
        f"{before}.patch_embedding",
        f"{before}.position_embedding.weight",
        f"{before}.class_embedding",
    )
    if config["model"]["modalities"]["image"]["norm"]:
        found += norm(f"{theirs}pre_layrnorm", "embedders_image/norm")
    found += blocks(f"{theirs}encoder.layers.{{layer}}", "towers_image", CLIP_BLOCK, options)
    if options.final_norm:
        found += norm(f"{theirs}post_layernorm", "towers_image/norm")
    return found


# Blocks of CLIP, SigLIP and the vision model of IDEFICS.
CLIP_BLOCK = {
    **projections("self_attn.{letter}_proj", "self_attn.out_proj"),
    "attention_norm": "layer_norm1",
    "feed_forward_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
# Blocks of Llama and those built like it, such as the language model of IDEFICS.
LLAMA_BLOCK = {
    **projections("self_attn.{letter}_proj", "self_attn.o_proj"),
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
