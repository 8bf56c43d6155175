"""GPT-2 (Radford et al. 2019): a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unified_mm.pretrained.family import Export, Family, prefix, token_ids
from unified_mm.pretrained.fields import Fields, language_model, language_text, read, written
from unified_mm.pretrained.layers import blocks, line, main_options, norm, vocabulary
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table, transposed_first
from unified_mm.pretrained.vocabularies import TokenLayout, gpt2_files

STACK = {
    "width": ("n_embd", 768),
    "layers": ("n_layer", 12),
    "heads": ("n_head", 12),
    "feed_forward": ("n_inner", None),
    "norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "activation": ("activation_function", "gelu_new"),
}
TEXT = {
    "vocabulary": ("vocab_size", 50257),
    "max_positions": ("n_positions", 1024),
    "head": ("tie_word_embeddings", True),
}
BLOCK = {
    "packed": "attn.c_attn.",
    "output": "attn.c_proj",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def fields(source: Source) -> Fields:
    """Returns the fields of a language model with learned positions and layer norms."""
    c = source.config
    c.refuse_unless("scale_attn_weights", True, why="attention is scaled here")
    c.refuse_unless("scale_attn_by_inverse_layer_idx", False, why="all layers scale alike here")
    c.refuse_unless("add_cross_attention", False, why="such layers are other ones here")
    stack = read(c, STACK)
    stack["feed_forward"] = stack["feed_forward"] or 4 * stack["width"]
    return language_model(stack, language_text(c, TEXT))


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of GPT-2's weights.

    Kernels are (in, out) there, and one tensor holds queries, keys and values side by side.
    """
    model = config["model"]
    before = prefix(names, "transformer.", probe="wte.weight")
    entries, copies = vocabulary(model, [f"{before}wte.weight"], ["lm_head.weight"])
    entries.append(line(f"{before}wpe.weight", "embedders_text/positions"))
    for entry in blocks(f"{before}h.{{layer}}", "transformer", BLOCK, main_options(model)):
        kernel = entry.ours[0].endswith("/kernel")
        turned = transposed_first(entry.transform) if kernel else entry.transform
        entries.append(replace(entry, transform=turned))
    entries += norm(f"{before}ln_f", "transformer/norm")
    buffers = {r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)": "a causal mask, not learned"}
    return Table(entries, buffers, copies)


def their_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a run."""
    model = config["model"]
    text = written(model["modalities"]["text"], TEXT)
    return {**text, **written(model, STACK), **token_ids(tokenizer)}


GPT2 = Family(
    name="GPT-2",
    types=("gpt2",),
    part="text",
    fields=fields,
    table=table,
    tokens=TokenLayout(gpt2_files, defaults={"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    export=Export("GPT2LMHeadModel", their_config, ("model",)),
)
