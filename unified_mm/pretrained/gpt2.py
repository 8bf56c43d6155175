"""GPT-2 (Radford et al. 2019): a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.modalities.text import VOCABULARY_MULTIPLE
from unified_mm.pretrained.family import Export, Family, Fields, prefix, text_fields
from unified_mm.pretrained.layers import (
    ACTIVATIONS,
    OUR_ATTENTION,
    activation,
    line,
    main_options,
    norm,
)
from unified_mm.pretrained.source import Section, Source
from unified_mm.pretrained.tables import (
    SAME,
    Entry,
    Table,
    packed,
    padded_rows,
    repeated,
    reshaped,
)
from unified_mm.pretrained.vocabularies import TokenLayout, gpt2_files

LONGEST = 512  # tokens of a text in the run's config; the model may know more positions
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def fields(source: Source) -> Fields:
    """Returns the fields of a language model with learned positions and layer norms."""
    c = Section(source.config.where, source.config, DEFAULTS)
    c.refuse_unless("scale_attn_weights", True, why="attention is scaled here")
    c.refuse_unless("scale_attn_by_inverse_layer_idx", False, why="all layers scale alike here")
    c.refuse_unless("add_cross_attention", False, why="such layers are other ones here")
    return {
        "model": {
            "fusion": "early",
            "width": c["n_embd"],
            "layers": c["n_layer"],
            "heads": c["n_head"],
            "feed_forward": c["n_inner"] or 4 * c["n_embd"],
            "norm_epsilon": c["layer_norm_epsilon"],
            "activation": activation(c, "activation_function"),
            "modalities": {
                "text": text_fields(
                    length=min(c["n_positions"], LONGEST),
                    max_positions=c["n_positions"],
                    vocabulary=c["vocab_size"],
                    head="tied" if c["tie_word_embeddings"] else "own",
                )
            },
        },
        "objectives": {"captioning": {"weight": 1.0, "rule": "separate"}},
    }


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of GPT-2's weights.

    Kernels are (in, out) there, and one tensor holds queries, keys and values side by side.
    """
    model = config["model"]
    o, text = main_options(model), model["modalities"]["text"]
    before = prefix(names, "transformer.", probe="wte.weight")
    rows = padded_rows(text["vocabulary"], multiple=VOCABULARY_MULTIPLE)
    entries = [
        line(f"{before}wte.weight", "embedders_text/tokens", rows),
        line(f"{before}wpe.weight", "embedders_text/positions"),
        *repeated(_block(o), f"{before}h.{{layer}}", "transformer/layers/block_{block}", o.layers),
        *norm(f"{before}ln_f", "transformer/norm"),
    ]
    copies = {}
    if text["head"] == "own":
        entries.append(line("lm_head.weight", "embedders_text/scores", rows))
    else:
        copies["lm_head.weight"] = f"{before}wte.weight"
    buffers = {r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)": "a causal mask, not learned"}
    return Table(entries, buffers, copies)


def _block(o: Any) -> list[Entry]:
    three = [OUR_ATTENTION[name] for name in ("query", "key", "value")]
    kernel = reshaped((o.width, o.width), (o.width, o.heads, o.head_dim))
    bias = reshaped((o.width,), (o.heads, o.head_dim))
    out = reshaped((o.width, o.width), (o.heads, o.head_dim, o.width))
    feed_forward = "feed_forward/mlp/shared"
    return [
        *norm("ln_1", "attention_norm"),
        Entry(
            ("attn.c_attn.weight",), tuple(f"{path}/kernel" for path in three), packed(3, 1, kernel)
        ),
        Entry(("attn.c_attn.bias",), tuple(f"{path}/bias" for path in three), packed(3, 0, bias)),
        line("attn.c_proj.weight", f"{OUR_ATTENTION['output']}/kernel", out),
        line("attn.c_proj.bias", f"{OUR_ATTENTION['output']}/bias"),
        *norm("ln_2", "feed_forward_norm"),
        line("mlp.c_fc.weight", f"{feed_forward}/up/kernel", SAME),
        line("mlp.c_fc.bias", f"{feed_forward}/up/bias"),
        line("mlp.c_proj.weight", f"{feed_forward}/down/kernel", SAME),
        line("mlp.c_proj.bias", f"{feed_forward}/down/bias"),
    ]


def their_config(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the contents of config.json for a run."""
    m = config["model"]
    text = m["modalities"]["text"]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": text["vocabulary"],
        "n_positions": text["max_positions"],
        "n_embd": m["width"],
        "n_layer": m["layers"],
        "n_head": m["heads"],
        "n_inner": m["feed_forward"],
        "activation_function": theirs(m["activation"], "gelu_new"),
        "layer_norm_epsilon": m["norm_epsilon"],
        "tie_word_embeddings": text["head"] == "tied",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": "float32",
    }


def theirs(activation: str, usual: str) -> str:
    """Returns their name for our activation, `usual` where it is one of several."""
    if ACTIVATIONS[usual] == activation:
        return usual
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


GPT2 = Family(
    name="GPT-2",
    types=("gpt2",),
    part="text",
    fields=fields,
    table=table,
    tokens=TokenLayout(gpt2_files, defaults={"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    export=Export(their_config, ("model",)),
)
