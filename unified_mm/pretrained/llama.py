"""Llama (Touvron et al. 2023) and models of the same architecture: SmolLM, Qwen 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.modalities.text import VOCABULARY_MULTIPLE
from unified_mm.pretrained.family import Export, Family, Fields, prefix, text_fields
from unified_mm.pretrained.gpt2 import LONGEST, theirs
from unified_mm.pretrained.layers import (
    LLAMA_BLOCK,
    activation,
    blocks,
    line,
    main_options,
    norm,
)
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import Table, padded_rows
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


def _fields(source: Source, defaults: Mapping[str, Any], qkv_bias: bool | None) -> Fields:
    c = Section(source.config.where, source.config, defaults)
    refuse_windows(c)
    bias = bool(c["attention_bias"])
    return {
        "model": {
            "fusion": "early",
            "width": c["hidden_size"],
            "layers": c["num_hidden_layers"],
            "heads": c["num_attention_heads"],
            "key_value_heads": c["num_key_value_heads"] or c["num_attention_heads"],
            "head_width": c["head_dim"] or c["hidden_size"] // c["num_attention_heads"],
            "feed_forward": c["intermediate_size"],
            "norm": "rms",
            "norm_epsilon": c["rms_norm_eps"],
            "activation": activation(c, "hidden_act"),
            "gated_feed_forward": True,
            "query_bias": bias if qkv_bias is None else qkv_bias,
            "output_bias": bias if qkv_bias is None else False,
            "feed_forward_bias": bool(c["mlp_bias"]),
            "rotary_base": rotary_base(c),
            "modalities": {
                "text": text_fields(
                    length=min(c["max_position_embeddings"], LONGEST),
                    max_positions=c["max_position_embeddings"],
                    learned_positions=False,
                    vocabulary=c["vocab_size"],
                    head="tied" if c["tie_word_embeddings"] else "own",
                )
            },
        },
        "objectives": {"captioning": {"weight": 1.0, "rule": "separate"}},
    }


def llama_fields(source: Source) -> Fields:
    """Returns the fields of Llama: RMS norms, rotary positions and a gated feed-forward.

    Keys and values may have fewer heads than queries.
    """
    return _fields(source, LLAMA_DEFAULTS, None)


def qwen2_fields(source: Source) -> Fields:
    """Returns the fields of Qwen 2: Llama's, with a bias of queries, keys and values."""
    return _fields(source, QWEN2_DEFAULTS, True)


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of Llama's weights, whose kernels are all (out, in)."""
    model = config["model"]
    o, text = main_options(model), model["modalities"]["text"]
    before = prefix(names, "model.", probe="embed_tokens.weight")
    rows = padded_rows(text["vocabulary"], multiple=VOCABULARY_MULTIPLE)
    entries = [
        line(f"{before}embed_tokens.weight", "embedders_text/tokens", rows),
        *blocks(f"{before}layers.{{layer}}", "transformer", LLAMA_BLOCK, o),
        *norm(f"{before}norm", "transformer/norm", "rms"),
    ]
    copies = {}
    if text["head"] == "own":
        entries.append(line("lm_head.weight", "embedders_text/scores", rows))
    else:
        copies["lm_head.weight"] = f"{before}embed_tokens.weight"
    return Table(entries, ROTARY_BUFFERS, copies)


ROTARY_BUFFERS = {r".*rotary_emb\.inv_freq": "rates of rotary positions, not learned"}


def their_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a run."""
    m = config["model"]
    text = m["modalities"]["text"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": text["vocabulary"],
        "hidden_size": m["width"],
        "intermediate_size": m["feed_forward"],
        "num_hidden_layers": m["layers"],
        "num_attention_heads": m["heads"],
        "num_key_value_heads": m["key_value_heads"],
        "head_dim": m["head_width"],
        "hidden_act": theirs(m["activation"], "silu"),
        "max_position_embeddings": text["max_positions"],
        "rms_norm_eps": m["norm_epsilon"],
        "rope_theta": m["rotary_base"],
        "attention_bias": m["query_bias"],
        "mlp_bias": m["feed_forward_bias"],
        "tie_word_embeddings": text["head"] == "tied",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": "float32",
    }


TOKENS = TokenLayout(gpt2_files)
LLAMA = Family(
    name="Llama",
    types=("llama",),
    part="text",
    fields=llama_fields,
    table=table,
    tokens=TOKENS,
    export=Export(their_config, ("model",)),
)
QWEN2 = Family(
    name="Qwen 2", types=("qwen2",), part="text", fields=qwen2_fields, table=table, tokens=TOKENS
)
