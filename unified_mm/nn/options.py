"""What a stack of transformer blocks looks like, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax.numpy as jnp

from unified_mm.config import check_options, option
from unified_mm.nn.pipeline import Pipeline

NORMS = ("layer", "rms")
NORM_PLACES = ("pre", "post")
ACTIVATIONS = ("gelu", "gelu_exact", "quick_gelu", "silu", "relu")
REMAT = ("none", "full", "dots", "offload")
ATTENTION = ("auto", "xla", "chunked", "cudnn", "splash")
CACHE = ("same", "int8")
GATES = ("tanh", "sigmoid")
GATE_SHAPES = ("scalar", "channel")


@dataclass(frozen=True)
class GateOptions:
    """Gated cross-attention layers in a stack (Alayrac et al. 2022, section 3.1.2).

    Attributes:
      every: one before each n-th block; 0 has none.
      gate: g of `h + g(alpha) * ...`: 'tanh' (the paper's: nothing passes at first) or 'sigmoid'.
      shape: of alpha, 'scalar' or 'channel' (one for each of D).
      start: alpha at the start.
      query_key_norm: RMS normalisation of each head's queries and keys (IDEFICS).
    """

    every: int = 0
    gate: str = option("tanh", choices=GATES)
    shape: str = option("scalar", choices=GATE_SHAPES)
    start: float = 0.0
    query_key_norm: bool = False

    def __post_init__(self) -> None:
        check_options(self, "model.cross")


@dataclass(frozen=True)
class TransformerOptions:
    """Shape and kind of a stack; the defaults are those of a pre-norm transformer.

    Attributes:
      width, layers, heads, feed_forward: D, L, H and F.
      key_value_heads: fewer heads of keys and values than of queries, shared by groups of these
        (Ainslie et al. 2023); 0 has as many.
      head_width: A; 0 is D / H.
      dropout: share of each residual branch's outputs that training drops.
      norm: 'layer' or 'rms' (Zhang & Sennrich 2019); `norm_epsilon` under its root.
      norm_place: 'pre', before each branch, or 'post', after adding it to the stream.
      final_norm: whether a norm follows the last block.
      block: what a layer of the stack is, by name or `package.module:CLASS`
        (`nn.transformer.BLOCKS`); `block_options` are fields of its own.
      feed_forward_type: what stands after attention, by name or `package.module:CLASS`
        (`nn.feed_forward.FEED_FORWARDS`); `feed_forward_options` are fields of its own.
      activation: of the feed-forward; see `ACTIVATIONS` ('gelu' is its tanh form).
      gated_feed_forward: `act(gate(x)) * up(x)` (Shazeer 2020) and not `act(up(x))`.
      query_bias, output_bias, feed_forward_bias: of queries, keys and values; of what attention and
        feed-forward put out.
      rotary_base: of rotary positions (Su et al. 2021); 0 has none.
      separate_attention, separate_feed_forward: parameters of its own for each modality.
      remat: which of a period's activations the backward pass recomputes instead of their being
        kept: 'none'; 'full', all but its input; 'dots', all but products with weights (attention's
        scores are recomputed); 'offload', the same with these products kept in the host's memory
        (on a CPU, where that is the only one, it is 'dots').
      attention: which program computes it; see `nn.attention.backends`.
      unroll: how many periods a step of the scan holds; the parameter tree is the same. Always one
        where something is recomputed: within a step the compiler would keep it after all.
      apart: whether each period has parameters, keys and values of its own and nothing is stacked
        or scanned (`nn.unstack`); for inference.
      dtype: of the computation; parameters are float32.
      cache: what generation keeps keys and values as: 'same', as `dtype`, or 'int8'.
      cross: the gated cross-attention layers between the blocks.
      pipeline: the stages that its periods are divided among, in training; None for one.
    """

    width: int = option(least=1)
    layers: int = option(least=1)
    heads: int = option(least=1)
    feed_forward: int = option(least=1)
    key_value_heads: int = 0
    head_width: int = 0
    dropout: float = option(0.0, least=0, below=1)
    norm: str = option("layer", choices=NORMS)
    norm_epsilon: float = 1e-6
    norm_place: str = option("pre", choices=NORM_PLACES)
    final_norm: bool = True
    block: str = "transformer"
    block_options: tuple[tuple[str, Any], ...] = ()
    feed_forward_type: str = "dense"
    feed_forward_options: tuple[tuple[str, Any], ...] = ()
    activation: str = option("gelu", choices=ACTIVATIONS)
    gated_feed_forward: bool = False
    query_bias: bool = True
    output_bias: bool = True
    feed_forward_bias: bool = True
    rotary_base: float = 0.0
    separate_attention: bool = False
    separate_feed_forward: bool = False
    remat: str = option("none", choices=REMAT)
    attention: str = "auto"
    unroll: int = option(1, least=1)
    unstacked: bool = False
    dtype: Any = jnp.float32
    cache: str = option("same", choices=CACHE)
    cross: GateOptions = GateOptions()
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_options(self, "model")
        if ":" not in self.attention and self.attention not in ATTENTION:
            raise ValueError(
                f"model.attention={self.attention!r}: must be one of {', '.join(ATTENTION)}, or "
                "'package.module:NAME' of a backend of your own"
            )
        if not self.head_width and self.width % self.heads:
            raise ValueError(f"model.width={self.width} is no multiple of heads={self.heads}")
        if self.heads % self.num_kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is no multiple of key_value_heads={self.num_kv_heads}"
            )
        if self.cross.every and self.layers % self.cross.every:
            raise ValueError(
                f"model.layers={self.layers} is no multiple of model.cross.every="
                f"{self.cross.every}: every cross-attention layer comes before as many blocks"
            )
        if self.rotary_base and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even width of heads, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """A, the width of a head."""
        return self.head_width or self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.key_value_heads or self.heads

    @property
    def blocks_per_period(self) -> int:
        """Blocks in each repeated part of the stack."""
        return self.cross.every or 1

    @property
    def periods(self) -> int:
        """How often that part is repeated."""
        return self.layers // self.blocks_per_period

    @classmethod
    def config_fields(cls) -> tuple[str, ...]:
        """Those that `config.model` holds under the same names."""
        elsewhere = ("unstacked", "cache", "cross", "pipeline")
        return tuple(field.name for field in fields(cls) if field.name not in elsewhere)

    @classmethod
    def from_config(cls, model: Mapping[str, Any]) -> TransformerOptions:
        """Of the main stack: the fields of `config.model` that bear these names."""
        known = {name: model[name] for name in cls.config_fields()}
        for name in ("block_options", "feed_forward_options"):
            known[name] = tuple(sorted(dict(known[name]).items()))
        try:
            known["dtype"] = jnp.dtype(known["dtype"])
        except TypeError as error:
            raise ValueError(f"model.dtype={known['dtype']!r} is no type of number") from error
        return cls(**known)

    def changed(self, changes: Mapping[str, Any]) -> TransformerOptions:
        """The same with other values; None, or a size of 0, leaves what there is."""
        given = {name: value for name, value in changes.items() if value is not None}
        for name in ("block_options", "feed_forward_options"):
            if name in given:
                given[name] = tuple(sorted(dict(given[name]).items()))
        for name in ("width", "layers", "heads", "feed_forward"):
            if not given.get(name):
                given.pop(name, None)
        return replace(self, **given)
