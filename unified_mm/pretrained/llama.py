"""Llama (Touvron et al. 2023) and models of the same architecture: SmolLM, Qwen 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.family import Export, Family, prefix, token_ids
from unified_mm.pretrained.fields import (
    STACK,
    Fields,
    Keys,
    language_model,
    language_text,
    read,
    usual,
    written,
)
from unified_mm.pretrained.layers import LLAMA_BLOCK, blocks, main_options, norm, vocabulary
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Table
from unified_mm.pretrained.vocabularies import TokenLayout, gpt2_files

ROPE = 10000.0
STACK_KEYS = {
    **usual(STACK, width=4096, layers=32, heads=32, feed_forward=11008, activation="silu"),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
}
HEAD_KEYS = {"key_value_heads": ("num_key_value_heads", None), "head_width": ("head_dim", None)}
BIASES = {"query_bias": ("attention_bias", False), "feed_forward_bias": ("mlp_bias", False)}
TEXT = {
    "vocabulary": ("vocab_size", 32000),
    "max_positions": ("max_position_embeddings", 2048),
    "head": ("tie_word_embeddings", False),
}
QWEN2_KEYS = usual(STACK_KEYS | HEAD_KEYS, feed_forward=22016, key_value_heads=32)
QWEN2_TEXT = usual(TEXT, vocabulary=151936, max_positions=32768)
ROTARY_BUFFERS = {r".*rotary_emb\.inv_freq": "rates of rotary positions, not learned"}


def stack_fields(c: Section, keys: Keys) -> Fields:
    """Returns the fields of a stack of Llama's blocks without biases, and those of `keys`."""
    return {
        "norm": "rms",
        "gated_feed_forward": True,
        "query_bias": False,
        "output_bias": False,
        "feed_forward_bias": False,
        "rotary_base": rotary_base(c),
        **read(c, keys),
    }


def rotary_base(c: Section) -> float:
    """Returns the base of the rotary positions, from either of the two keys that may hold it.

    Raises:
      ValueError: if positions are scaled, or not alike in all layers, or only a part of each head
        is rotated.
    """
    said = c.section("rope_scaling" if c.get("rope_scaling") else "rope_parameters")
    for key in ("rope_type", "type"):  # the second in older files
        said.refuse_unless(key, "default", why="rotary positions are not scaled here")
    for key, value in said.items():
        if isinstance(value, Mapping):
            said.refuse_unless(key, why="the positions of all layers are alike here")
    for section in (c, said):
        section.refuse_unless("partial_rotary_factor", None, 1.0, why="whole heads turn here")
    return float(said.get("rope_theta", c.get("rope_theta", ROPE)))


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
    fields = _model(source.config, STACK_KEYS | HEAD_KEYS, TEXT)
    fields["model"]["output_bias"] = fields["model"]["query_bias"]
    return fields


def qwen2_fields(source: Source) -> Fields:
    """Returns the fields of Qwen 2: Llama's, with a bias of queries, keys and values."""
    fields = _model(source.config, QWEN2_KEYS, QWEN2_TEXT)
    fields["model"]["query_bias"] = True
    return fields


def _model(c: Section, keys: Keys, text: Keys) -> Fields:
    refuse_windows(c)
    stack = stack_fields(c, {**keys, **BIASES})
    stack["key_value_heads"] = stack["key_value_heads"] or stack["heads"]
    stack["head_width"] = stack["head_width"] or stack["width"] // stack["heads"]
    return language_model(stack, language_text(c, text, learned_positions=False))


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
    options = main_options(model)
    keys = {**STACK_KEYS, **BIASES, "rotary_base": ("rope_theta", ROPE)}
    return {
        **written(model["modalities"]["text"], TEXT),
        **written(model, keys),
        "num_key_value_heads": options.num_kv_heads,
        "head_dim": options.head_dim,
        **token_ids(tokenizer),
    }


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
QWEN2 = Family(
    name="Qwen 2",
    types=("qwen2",),
    part="text",
    fields=qwen2_fields,
    table=table,
    tokens=TOKENS,
    export=Export("Qwen2ForCausalLM", their_config, ("model",)),
)
