"""BERT (Devlin et al. 2019) and sentence encoders of the same architecture, such as MiniLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.family import Family, prefix
from unified_mm.pretrained.fields import STACK, Fields, read, usual
from unified_mm.pretrained.layers import (
    POSITION_IDS,
    blocks,
    line,
    main_options,
    norm,
    projections,
    vocabulary,
)
from unified_mm.pretrained.source import Source
from unified_mm.pretrained.tables import Table, row
from unified_mm.pretrained.vocabularies import TokenLayout, bert_files

KEYS = usual(STACK, norm_epsilon=1e-12)
TEXT = {"vocabulary": ("vocab_size", 30522), "max_positions": ("max_position_embeddings", 512)}
BLOCK = {
    **projections("attention.self.{name}", "attention.output.dense"),
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_norm": "output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}
LOG_SCALE = 2.9957  # ln(1 / 0.05): where the comparison of texts starts (Gao et al. 2021)
POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}


def fields(source: Source) -> Fields:
    """Returns the fields of a text encoder whose pooled embeddings are compared with each other."""
    c = source.config
    c.refuse_unless("position_embedding_type", "absolute", None, why="positions are learned here")
    c.refuse_unless("is_decoder", False, why="all text is seen at once here")
    stack, text = read(c, KEYS), read(c, TEXT)
    known = text["max_positions"]
    longest = (source.json("sentence_bert_config.json") or {}).get("max_seq_length") or known
    return {
        "model": {
            "fusion": "late",
            **stack,
            "norm_place": "post",
            "final_norm": False,
            "modalities": {
                "text": {
                    "length": min(known, longest),
                    **text,
                    "scaled": False,
                    "norm": True,
                    "norm_epsilon": stack["norm_epsilon"],
                }
            },
        },
        "objectives": {
            "contrastive": {
                "weight": 1.0,
                "rule": "separate",
                "between": "text",
                "width": stack["width"],
                "text_pool": pooling(source),
                "projection": "none",
                "text_projection": "none",
            }
        },
    }


def pooling(source: Source) -> str:
    """Returns the pooling that a sentence encoder's files name, or 'mean' where they name none.

    Raises:
      ValueError: if the pooling is not one of `POOLINGS`, or a dense layer follows it.
    """
    modules = source.json("modules.json", list) or []
    if further := [m["type"] for m in modules if m["type"].rsplit(".")[-1] == "Dense"]:
        raise ValueError(f"{source.path / 'modules.json'}: {further[0]} has no place here")
    said = source.json("1_Pooling/config.json")
    if said is None:
        return "mean"
    kinds = [key.removeprefix("pooling_mode_") for key, on in said.items() if on is True]
    kinds = [kind for kind in kinds if f"pooling_mode_{kind}" in said]
    kinds += [said["pooling_mode"]] if isinstance(said.get("pooling_mode"), str) else []
    if len(kinds) != 1 or kinds[0] not in POOLINGS:
        raise ValueError(
            f"{source.path / '1_Pooling' / 'config.json'}: pooling {', '.join(kinds)}: one of "
            f"{', '.join(POOLINGS)} is what there is"
        )
    return POOLINGS[kinds[0]]


def table(config: Mapping[str, Any], names: frozenset[str]) -> Table:
    """Returns the table of BERT's weights.

    The embedding of token type 0, that of a single text, becomes our modality embedding.
    """
    before = prefix(names, "bert.", probe="embeddings.word_embeddings.weight")
    embeddings, options = f"{before}embeddings", main_options(config["model"])
    entries = [
        *vocabulary(config["model"], [f"{embeddings}.word_embeddings.weight"])[0],
        line(f"{embeddings}.position_embeddings.weight", "embedders_text/positions"),
        line(f"{embeddings}.token_type_embeddings.weight", "embedders_text/modality", row(0)),
        *norm(f"{embeddings}.LayerNorm", "embedders_text/norm"),
        *blocks(f"{before}encoder.layer.{{layer}}", "transformer", BLOCK, options),
    ]
    ignored = {
        **POSITION_IDS,
        r"(bert\.)?pooler\.dense\.(weight|bias)": "the pooler after the first token",
        r"cls\..*": "the heads of pre-training",
    }
    return Table(entries, ignored, starts={"heads_contrastive/log_scale": LOG_SCALE})


BERT = Family(
    name="BERT",
    types=("bert",),
    part="text",
    fields=fields,
    table=table,
    tokens=TokenLayout(
        bert_files,
        bos="cls_token",
        eos="sep_token",
        defaults={"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]"},
        eos_when_cut=True,
    ),
)
