"""Fields of a run's config that their config.json has under other names, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.pretrained.source import Section

Fields = dict[str, Any]  # of a run's config, nested
# Our field -> their key, and the value that their library takes where config.json has no such key.
Keys = Mapping[str, tuple[str, Any]]

LONGEST = 512  # tokens of a text in a language model's config; it may know more positions
STACK: Keys = {
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "feed_forward": ("intermediate_size", 3072),
    "norm_epsilon": ("layer_norm_eps", 1e-5),
    "activation": ("hidden_act", "gelu"),
}
# What they call an activation -> what we call it. Of several names, a family's
# default is written, or else the first.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def usual(keys: Keys, **values: Any) -> dict[str, tuple[str, Any]]:
    """Returns the keys with other values where config.json has no such key, by our fields."""
    return {ours: (theirs, values.get(ours, value)) for ours, (theirs, value) in keys.items()}


def read(section: Section, keys: Keys) -> Fields:
    """Returns our fields, read from their keys in a section of config.json.

    Raises:
      ValueError: if an activation is none of `ACTIVATIONS`; the message names it.
    """
    found = {ours: _value(section, *key) for ours, key in keys.items()}
    if "activation" in keys:
        if found["activation"] not in ACTIVATIONS:
            said = f"{keys['activation'][0]}={found['activation']!r}"
            known = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"{section.where}: {said} is none of {known}")
        found["activation"] = ACTIVATIONS[found["activation"]]
    if "head" in keys:
        found["head"] = "tied" if found["head"] else "own"
    return found


def _value(section: Section, key: str, default: Any) -> Any:
    value = section.get(key, default)
    return bool(value) if isinstance(default, bool) else value


def written(fields: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """Returns their keys with the values of our fields, the reverse of `read`."""
    found = {theirs: fields[ours] for ours, (theirs, _) in keys.items()}
    if "activation" in keys:
        key, default = keys["activation"]
        names = [theirs for theirs, ours in ACTIVATIONS.items() if ours == fields["activation"]]
        found[key] = default if default in names else names[0]
    if "head" in keys:
        found[keys["head"][0]] = fields["head"] == "tied"
    return found


def text_fields(**more: Any) -> Fields:
    """Returns `more` with the usual text fields: neither scaling nor a modality embedding."""
    return {"modality_embedding": False, "scaled": False, **more}


def tower_alone(name: str, modality: Fields, tower: Fields, pool: str) -> Fields:
    """Returns the fields of a modality's tower, whose pooled tokens are what it embeds.

    It stands in a model of two towers; the other one, of texts, is yet to come.
    """
    contrast = {
        "weight": 1.0,
        "between": name,
        "width": tower["width"],
        "pool": pool,
        "projection": "none",
        "text_projection": "none",
    }
    model = {
        "fusion": "late",
        "width": tower["width"],
        "heads": tower["heads"],
        "tower": tower,
        "modalities": {name: modality, "text": {}},
    }
    return {"model": model, "objectives": {"contrastive": contrast}}


def language_text(section: Section, keys: Keys, **more: Any) -> Fields:
    """Returns the fields of the text that a language model writes, with `more`."""
    fields = read(section, keys)
    return text_fields(length=min(fields["max_positions"], LONGEST), **fields, **more)


def language_model(stack: Fields, text: Fields) -> Fields:
    """Returns the fields of a model of texts alone."""
    return {
        "model": {"fusion": "early", **stack, "modalities": {"text": text}},
        "objectives": {"captioning": {"weight": 1.0, "rule": "separate"}},
    }
