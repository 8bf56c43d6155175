"""Llama (Touvron et al. 2023) and models of the same architecture: SmolLM, Qwen 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.family import Export, Family, prefix, token_ids
from unified_mm.pretrained.fields import (
    STACK,
    TEXT,
    Fields,
    language_model,
    language_text,
    read,
    written,
)
from unified_mm.pretrained.layers import LLAMA_BLOCK, blocks, main_options, norm, vocabulary
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Table
from unified_mm.pretrained.vocabularies import TokenLayout, gpt2_files

ROPE = 10000.0
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
QWEN2_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
STACK_KEYS = STACK | {"norm_epsilon": "rms_norm_eps"}
HEAD_KEYS = {"key_value_heads": "num_key_value_heads", "head_width": "head_dim"}
ROTARY_BUFFERS = {r".*rotary_emb\.inv_freq": "rates of rotary positions, not learned"}


def stack_fields(c: Section, **biases: bool) -> Fields:
    """Returns the fields of a stack of Llama's blocks, without biases but for `biases`."""
    return {
        **read(c, STACK_KEYS),
        "norm": "rms",
        "gated_feed_forward": True,
        **{"query_bias": False, "output_bias": False, "feed_forward_bias": False, **biases},
        "rotary_base": rotary_base(c),
    }


def rotary_base(c: Section) -> float:
    """Returns the base of the rotary positions, from either of the two keys that may hold it.

    Raises:
      ValueError: if positions are scaled, or only a part of each head is rotated.
    """
    c.refuse_unless("rope_scaling", None, why="rotary positions are not scaled here")
    c.refuse_unless("partial_rotary_factor", None, 1.0, why="whole heads are turned here")
    inner = c.section("rope_parameters", {"rope_theta": c.get("rope_theta", ROPE)})
    inner.refuse_unless("rope_type", "default", why="rotary positions are not scaled here")
    inner.refuse_unless("partial_rotary_factor", None, 1.0, why="whole heads are turned here")
    return float(inner["rope_theta"])


def refuse_windows(c: Section) -> None:
    """Checks that every layer attends to all earlier tokens.

    Raises:
      ValueError: if attention has a sliding window, or layers of another type.
    """
    if c.get("use_sliding_window", c.get("sliding_window") is not None):
        c.refuse_unless("sliding_window", None, why="there is no sliding window here")
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        c.refuse_unless("layer_types", why="all layers attend to all that came before here")


def fields(source: Source) -> Fields:
    """Returns the fields of Llama: RMS norms, rotary positions and a gated feed-forward.

    Keys and values may have fewer heads than queries.
    """
    c = Section(source.config.where, source.config, LLAMA_DEFAULTS)
    bias = bool(c["attention_bias"])
    return _model(c, query_bias=bias, output_bias=bias)


def qwen2_fields(source: Source) -> Fields:
    """Returns the fields of Qwen 2: Llama's, with a bias of queries, keys and values."""
    return _model(Section(source.config.where, source.config, QWEN2_DEFAULTS), query_bias=True)


def _model(c: Section, **biases: bool) -> Fields:
    refuse_windows(c)
    stack = stack_fields(c, feed_forward_bias=bool(c["mlp_bias"]), **biases) | read(c, HEAD_KEYS)
    stack["key_value_heads"] = stack["key_value_heads"] or stack["heads"]
    stack["head_width"] = stack["head_width"] or stack["width"] // stack["heads"]
    return language_model(stack, language_text(c, TEXT, learned_positions=False))


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of Llama's weights, whose kernels are all (out, in)."""
    model = config["model"]
    before = prefix(names, "model.", probe="embed_tokens.weight")
    entries, copies = vocabulary(model, [f"{before}embed_tokens.weight"], ["lm_head.weight"])
    entries += blocks(f"{before}layers.{{layer}}", "transformer", LLAMA_BLOCK, main_options(model))
    entries += norm(f"{before}norm", "transformer/norm", "rms")
    return Table(entries, ROTARY_BUFFERS, copies)


def their_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a run."""
    model = config["model"]
    biases = {"query_bias": "attention_bias", "feed_forward_bias": "mlp_bias"}
    keys = {**STACK_KEYS, **HEAD_KEYS, **biases, "rotary_base": "rope_theta"}
    text = written(model["modalities"]["text"], TEXT)
    return {**text, **written(model, keys), **token_ids(tokenizer)}


TOKENS = TokenLayout(gpt2_files)
LLAMA = Family(
    name="Llama",
    types=("llama",),
    part="text",
    fields=fields,
    table=table,
    tokens=TOKENS,
    export=Export("LlamaForCausalLM", their_config, ("model",)),
)
QWEN2 = Family("Qwen 2", ("qwen2",), "text", qwen2_fields, table, TOKENS)
