"""Llama (Touvron et al. 2023) and those built like it: SmolLM, Mistral, Qwen 2, Qwen 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.nn.options import TransformerOptions
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
from unified_mm.pretrained.source import Section
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
QWEN3_KEYS = {**QWEN2_KEYS, "head_width": ("head_dim", 128)}
MISTRAL_KEYS = usual(STACK_KEYS | HEAD_KEYS, feed_forward=14336, key_value_heads=8)
MISTRAL_TEXT = usual(TEXT, max_positions=131072)
WINDOW = 4096  # of Mistral, where config.json has no such key
# By the type of scaled rotary positions, the fields of it that are read.
SCALED = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
ROTARY_BUFFERS = {r".*rotary_emb\.inv_freq": "rates of rotary positions, not learned"}


def stack_fields(c: Section, keys: Keys) -> Fields:
    """Returns the fields of a stack of Llama's blocks without biases, and those of `keys`."""
    return {
        "norm": "rms",
        "gated_feed_forward": True,
        "query_bias": False,
        "output_bias": False,
        "feed_forward_bias": False,
        **rotary_fields(c),
        **read(c, keys),
    }


def rotary_fields(c: Section) -> Fields:
    """Returns the fields of the rotary positions, from either of the two keys that may hold them.

    Raises:
      ValueError: if positions are scaled in a way that is none of `SCALED`, or not alike in all
        layers, or only a part of each head is rotated.
    """
    said = c.section("rope_scaling" if c.get("rope_scaling") else "rope_parameters")
    for key in ("type", "rope_type"):  # the first in older files
        said.refuse_unless(key, "default", *SCALED, why=f"no scaling but {', '.join(SCALED)}")
    for key, value in said.items():
        if isinstance(value, Mapping):
            said.refuse_unless(key, why="the positions of all layers are alike here")
    for section in (c, said):
        section.refuse_unless("partial_rotary_factor", None, 1.0, why="whole heads turn here")
    kind = said.get("rope_type", said.get("type", "default"))
    missing = [name for name in SCALED.get(kind, ()) if name not in said]
    if missing:
        raise ValueError(f"{said.where}: has no {', '.join(missing)}, which {kind!r} needs")
    scaling = {name: said[name] for name in SCALED.get(kind, ())}
    return {
        "rotary_base": float(said.get("rope_theta", c.get("rope_theta", ROPE))),
        "rotary_options": {"type": kind, **scaling} if scaling else {},
    }


def refuse_windows(c: Section, longest: int = 0) -> None:
    """Checks that every layer attends to all earlier tokens.

    Args:
      c: their config.
      longest: tokens that the model knows at most; a window of as many hides none.

    Raises:
      ValueError: if attention has a sliding window, or layers of another type.
    """
    window = c.get("sliding_window")
    if c.get("use_sliding_window", True) and window is not None and not 0 < longest <= window:
        why = (
            "a sliding window of some layers is not read (Mistral's, of all, is); up to as many "
            "tokens all is the same without it: a config.json with max_position_embeddings of no "
            "more than that can be read"
        )
        c.refuse_unless("sliding_window", None, why=why)
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        c.refuse_unless("layer_types", why="all layers attend to all that came before here")


def fields(c: Section) -> Fields:
    """Returns the fields of Llama: RMS norms, rotary positions and a gated feed-forward.

    Keys and values may have fewer heads than queries.
    """
    fields = _model(c, STACK_KEYS | HEAD_KEYS, TEXT)
    fields["model"]["output_bias"] = fields["model"]["query_bias"]
    return fields


def qwen2_fields(c: Section) -> Fields:
    """Returns the fields of Qwen 2: Llama's, with a bias of queries, keys and values."""
    fields = _model(c, QWEN2_KEYS, QWEN2_TEXT)
    fields["model"]["query_bias"] = True
    return fields


def qwen3_fields(c: Section) -> Fields:
    """Returns the fields of Qwen 3: Llama's, with a norm of each head's queries and keys."""
    fields = _model(c, QWEN3_KEYS, QWEN2_TEXT)
    fields["model"]["output_bias"] = fields["model"]["query_bias"]
    fields["model"]["query_key_norm"] = True
    return fields


def mistral_fields(c: Section) -> Fields:
    """Returns the fields of Mistral: Llama's, without any bias, and with a sliding window."""
    window = c.get("sliding_window", WINDOW)
    # Keys that Mistral does not know, and a window of all tokens, which hides none.
    none = {"attention_bias": False, "mlp_bias": False}
    whole = Section(c.where, {**c, **none, "sliding_window": None})
    fields = _model(whole, MISTRAL_KEYS, MISTRAL_TEXT)
    longest = fields["model"]["modalities"]["text"]["max_positions"]
    fields["model"]["window"] = window if window and window < longest else 0
    return fields


def _model(c: Section, keys: Keys, text: Keys) -> Fields:
    refuse_windows(c, read(c, text)["max_positions"])
    stack = stack_fields(c, {**keys, **BIASES})
    stack["key_value_heads"] = stack["key_value_heads"] or stack["heads"]
    stack["head_width"] = stack["head_width"] or stack["width"] // stack["heads"]
    return language_model(stack, language_text(c, text, learned_positions=False))


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of Llama's weights, whose kernels are all (out, in)."""
    before = prefix(names, "model.", probe="embed_tokens.weight")
    return language_table(config["model"], before, "lm_head.weight")


def language_table(model: Mapping[str, Any], before: str, scores: str) -> Table:
    """Returns the table of a Llama whose names begin with `before`, and of its scores."""
    entries, copies = vocabulary(model, [f"{before}embed_tokens.weight"], [scores])
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
        **their_scaling(options),
        **token_ids(tokenizer),
    }


def their_scaling(options: TransformerOptions) -> dict[str, Any]:
    """Returns their key of scaled rotary positions, if these are."""
    said = dict(options.rotary_options)
    return {"rope_scaling": {"rope_type": said.pop("type"), **said}} if said else {}


def mistral_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a Mistral run."""
    window = main_options(config["model"]).window or None
    return {**their_config(config, tokenizer), "sliding_window": window}


TOKENS = TokenLayout(gpt2_files)
LLAMA = Family(
    name="Llama",
    types=("llama",),
    part="text",
    fields=lambda source: fields(source.config),
    table=table,
    tokens=TOKENS,
    export=Export("LlamaForCausalLM", their_config, ("model",)),
)
QWEN2 = Family(
    name="Qwen 2",
    types=("qwen2",),
    part="text",
    fields=lambda source: qwen2_fields(source.config),
    table=table,
    tokens=TOKENS,
    export=Export("Qwen2ForCausalLM", their_config, ("model",)),
)
QWEN3 = Family(
    name="Qwen 3",
    types=("qwen3",),
    part="text",
    fields=lambda source: qwen3_fields(source.config),
    table=table,
    tokens=TOKENS,
    export=Export("Qwen3ForCausalLM", their_config, ("model",)),
)
MISTRAL = Family(
    name="Mistral",
    types=("mistral",),
    part="text",
    fields=lambda source: mistral_fields(source.config),
    table=table,
    tokens=TOKENS,
    export=Export("MistralForCausalLM", mistral_config, ("model",)),
)
