"""The shape and kind of a stack of transformer blocks, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax.numpy as jnp

from unified_mm.config import check_options, option, read_options
from unified_mm.nn.pipeline import Pipeline
from unified_mm.nn.places import PLACES
from unified_mm.parallel.mesh import platform
from unified_mm.registry import resolve

NORMS = ("layer", "rms")
NORM_PLACES = ("pre", "post")
ACTIVATIONS = ("gelu", "gelu_exact", "quick_gelu", "silu", "relu")
REMAT = ("none", "full", "dots", "offload")
ATTENTION = ("auto", "xla", "chunked", "blocks", "cudnn", "splash")
CACHE = ("same", "int8")
ROTARY_AXES = ("order", "places")
GATES = ("tanh", "sigmoid")
GATE_SHAPES = ("scalar", "channel")
# Kinds of blocks: modules of `options`, `deterministic` and fields of their own,
# (x [B, N, D], plan, cached keys and values or None) -> (x, keys and values).
BLOCKS = {"transformer": "unified_mm.nn.transformer:Block"}
# Kinds of feed-forwards: modules of `options` and fields of their own, (x, plan) -> [B, N, D]. One
# with a field `every` stands in the last of every so many blocks; the others are dense.
FEED_FORWARDS = {
    "dense": "unified_mm.nn.feed_forward:FeedForward",
    "experts": "unified_mm.nn.experts:Experts",
    "neurons": "unified_mm.nn.neurons:Neurons",
}

# Options of a class that the config names, as pairs: options are hashed.
OWN_OPTIONS = ("block_options", "feed_forward_options", "rotary_options", "sparse")


def frozen(groups: Mapping[str, Any]) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Returns each group as sorted pairs of name and value, lists and groups in it as tuples."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple((name, one(each)) for name, each in sorted(value.items()))
        if isinstance(value, (list, tuple)):
            return tuple(one(each) for each in value)
        return value

    return {group: one(dict(options)) for group, options in groups.items()}


def dtype_on(platform: str, asked: str) -> str:
    """Returns the type of numbers that is computed in, which is 'auto' or given.

    'auto' is bfloat16, which has the range of float32 and is many times as fast where matrix units
    multiply it; a CPU is slower with it than with float32.
    """
    if asked != "auto":
        return asked
    return "float32" if platform == "cpu" else "bfloat16"


@dataclass(frozen=True)
class GateOptions:
    """Gated cross-attention layers in a stack (Alayrac et al. 2022, section 3.1.2).

    Attributes:
      every: how many blocks follow each cross-attention layer; 0 means no such layers.
      gate: g in `h + g(alpha) * ...`: 'tanh' (the paper's, closed while alpha is 0) or 'sigmoid'.
      shape: of alpha, 'scalar' or 'channel' (one for each of D).
      start: initial value of alpha.
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
class SparseOptions:
    """What a token sees of its modality: of what its rule lets it see, what any of these keeps.

    Attributes:
      window: tokens at fewer positions away; 0 for none.
      grid: patches so many rows and columns away at most; 0 for none.
      first: so many tokens, the first of the modality in a document, are seen by all and see all.
      random: so many blocks that each block draws among itself and those before it, and those that
        draw it (`nn.attention.patterns.RandomBlocks`).
      block: positions of such a block.
      seed: of the draw.
    """

    window: int = option(0, least=0)
    grid: int = option(0, least=0)
    first: int = option(0, least=0)
    random: int = option(0, least=0)
    block: int = option(64, least=1)
    seed: int = option(0, least=0)


@dataclass(frozen=True)
class DroppingOptions:
    """Tokens of the context that end after some layers, the least important ones.

    Attributes:
      keep: the share of each modality's tokens that goes on; with 1 all do, and nothing is scored.
      after: the layer after which the others end.
      by: what is important: 'learned', what a scorer says; 'distinct', what is unlike the mean of
        its group's tokens.
    """

    keep: float = option(1.0, above=0)
    after: int = option(1, least=1)
    by: str = option("learned", choices=("learned", "distinct"))

    def __post_init__(self) -> None:
        check_options(self, "model.dropping")
        if self.keep > 1:
            raise ValueError(f"model.dropping.keep={self.keep}: a share is at most 1")


def sparse_options(modality: str, given: Any) -> SparseOptions:
    """Returns the options that `model.sparse` has for a modality, as a group or pairs.

    Raises:
      ValueError: an option is unknown or out of range, or none says what is seen.
    """
    where = f"model.sparse.{modality}"
    found = SparseOptions(**read_options(SparseOptions, dict(given), where))
    check_options(found, where)
    if not (found.window or found.grid or found.first or found.random):
        raise ValueError(
            f"{where}: says nothing of what its tokens see; set window, grid, first or random, or "
            "leave it out"
        )
    return found


def derived() -> Any:
    """Returns a dataclass field that follows from the others."""
    return field(init=False, default=None, repr=False, compare=False)


def constructor(what: str, name: str, built_in: Mapping[str, str], own: Any) -> Any:
    """Returns the constructor of the module that a name stands for.

    Args:
      what: "block" or "feed_forward".
      name: of a kind, or `package.module:CLASS`.
      built_in: the kinds that there are.
      own: pairs of name and value, fields that this kind has of its own.

    Raises:
      ValueError: the kind is unknown, or does not have the options given.
    """
    kind = resolve(what.replace("_", "-"), name, built_in)
    return partial(kind, **read_options(kind, dict(own), f"model.{what}_options"))


def kind_option(make: Any, name: str, otherwise: Any) -> Any:
    """Returns the value of a field of what a `constructor` makes, `otherwise` without one."""
    defaults = {each.name: each.default for each in fields(make.func)}
    return make.keywords.get(name, defaults.get(name, otherwise))


@dataclass(frozen=True)
class TransformerOptions:
    """The shape and kind of a stack; the defaults are those of a pre-norm transformer.

    Attributes:
      width, layers, heads, feed_forward: D, L, H and F.
      key_value_heads: G; fewer than H are shared by groups of queries' heads (Ainslie et al. 2023);
        0 means H.
      head_width: A; 0 means D / H.
      dropout: probability with which training drops an output of a residual branch.
      norm: 'layer' or 'rms' (Zhang & Sennrich 2019).
      norm_epsilon: added to the variance or mean square in a norm.
      norm_place: 'pre', before each branch, or 'post', after its sum with the residual stream.
      final_norm: whether a norm follows the last block.
      block: kind of the blocks, by name or `package.module:CLASS` (`BLOCKS`).
      block_options: fields that this kind of block has of its own.
      feed_forward_type: kind of the feed-forward part, by name or `package.module:CLASS`
        (`FEED_FORWARDS`).
      feed_forward_options: fields that this kind of feed-forward has of its own.
      activation: of the feed-forward; see `ACTIVATIONS` ('gelu' is its tanh form).
      gated_feed_forward: whether it is `act(gate(x)) * up(x)` (Shazeer 2020) rather than
        `act(up(x))`.
      query_bias: whether the projections to queries, keys and values have biases.
      output_bias: whether the output projection of attention has a bias.
      feed_forward_bias: whether the dense maps of the feed-forward have biases.
      query_key_norm: whether each head's queries and keys have an RMS norm (Qwen 3).
      rotary_base: of rotary positions (Su et al. 2021); 0 means no rotary positions.
      rotary_options: their scaling to longer texts, by `type` (`nn.attention.rotary.SCALINGS`).
      window: how many tokens of its own sequence one sees at most, itself among them, by position
        (Mistral, Jiang et al. 2023); 0 means all that its rule lets it see.
      sparse: by modality, what its tokens see of each other (`SparseOptions`); those that are not
        named see all that their rule lets them see.
      rotary_axes: what they turn by: 'order', or 'places', where a third of each head goes by time,
        a third by row and a third by column, for tokens that have such (`nn.attention.rotary`).
      places: what is added to tokens by their time and coords, by one map for all modalities: ''
        nothing, 'sines', or 'fourier' (`nn.places`); a modality's own positions stay beside it.
      separate_attention, separate_feed_forward: whether each modality has parameters of its own.
      remat: which of a period's activations the backward pass recomputes instead of storing them:
        'none'; 'full', all but its input; 'dots', all but products with weights (attention's
        scores are recomputed); 'offload', the same with these products stored in the host's memory
        (on a CPU, which has no other, it is 'dots').
      attention: the backend that computes it; see `nn.attention.backends`.
      unroll: how many periods a step of the scan holds; the parameter tree is the same. It is
        always one where something is recomputed: within a step the compiler would store it anyway.
      unstacked: whether each period has parameters, keys and values of its own and nothing is
        stacked or scanned (`nn.unstack`); for inference.
      dtype: of the computation; parameters are float32.
      cache: type of cached keys and values in generation: 'same', which is `dtype`, or 'int8'.
      gathered: whether the neurons that predictors name are gathered (`nn.neurons`), and not found
        by computing all; for inference.
      counted: whether its products are to be counted: no kernel hides any, and attention computes
        none twice.
      exits: layers, counted from 1, after which an example may leave the stack (`nn.transformer`);
        an objective trains them ('exits').
      cross: the gated cross-attention layers between the blocks.
      dropping: which tokens of the context end after some layers; in early fusion.
      pipeline: the stages that its periods are divided among in training; None for one stage.
      make_block, make_feed_forward: constructors of the kinds that `block` and `feed_forward_type`
        name, with the fields of their own.
      patterns: `sparse` by modality, as options.
      head_dim: A, the width of a head.
      num_kv_heads: G, the number of heads of keys and of values.
      blocks_per_period: the number of blocks in each period, the repeated part of the stack.
      periods: the number of periods.
      branch_scale: initial scale of each of the 2 L residual branches (GPT-2, section 2.3).
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
    query_key_norm: bool = False
    rotary_base: float = 0.0
    rotary_options: tuple[tuple[str, Any], ...] = ()
    window: int = option(0, least=0)
    sparse: tuple[tuple[str, Any], ...] = ()
    rotary_axes: str = option("order", choices=ROTARY_AXES)
    places: str = option("", choices=PLACES)
    separate_attention: bool = False
    separate_feed_forward: bool = False
    remat: str = option("none", choices=REMAT)
    attention: str = "auto"
    unroll: int = option(1, least=1)
    unstacked: bool = False
    dtype: Any = jnp.float32
    cache: str = option("same", choices=CACHE)
    gathered: bool = False
    counted: bool = False
    exits: tuple[int, ...] = ()
    cross: GateOptions = GateOptions()
    dropping: DroppingOptions = DroppingOptions()
    pipeline: Pipeline | None = None
    # What follows from the fields above.
    make_block: Any = derived()
    make_feed_forward: Any = derived()
    patterns: Any = derived()
    head_dim: int = derived()
    num_kv_heads: int = derived()
    blocks_per_period: int = derived()
    periods: int = derived()
    branch_scale: float = derived()

    def __post_init__(self) -> None:
        check_options(self, "model")
        make_feed_forward = constructor(
            "feed_forward", self.feed_forward_type, FEED_FORWARDS, self.feed_forward_options
        )
        every = kind_option(make_feed_forward, "every", 1)
        blocks_per_period = self.cross.every or every
        found = {
            "make_block": constructor("block", self.block, BLOCKS, self.block_options),
            "make_feed_forward": make_feed_forward,
            "patterns": {name: sparse_options(name, each) for name, each in self.sparse},
            "head_dim": self.head_width or self.width // self.heads,
            "num_kv_heads": self.key_value_heads or self.heads,
            "blocks_per_period": blocks_per_period,
            "periods": self.layers // blocks_per_period,
            "branch_scale": (2 * self.layers) ** -0.5,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
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
        if every < 1 or blocks_per_period % every or self.layers % every:
            raise ValueError(
                f"model.feed_forward_options.every={every}: must divide model.layers="
                f"{self.layers}"
                + f" and model.cross.every={self.cross.every}"
                * bool(self.cross.every)
            )
        if self.cross.every and self.layers % self.cross.every:
            raise ValueError(
                f"model.layers={self.layers} is no multiple of model.cross.every="
                f"{self.cross.every}: every cross-attention layer comes before as many blocks"
            )
        known = range(blocks_per_period, self.layers, blocks_per_period)
        if list(self.exits) != sorted(set(self.exits) & set(known)):
            raise ValueError(
                f"model.exits={self.exits}: must be layers in ascending order, of "
                f"{', '.join(map(str, known)) or 'none that there are'}"
            )
        if self.dropping.keep < 1:
            self._check_dropping()
        if self.rotary_base and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even width of heads, not {self.head_dim}")

    def _check_dropping(self) -> None:
        after = self.dropping.after
        if after % self.blocks_per_period or after >= self.layers:
            raise ValueError(
                f"model.dropping.after={after}: must be a multiple of {self.blocks_per_period} "
                f"below model.layers={self.layers}"
            )
        if self.feed_forward_type != "dense":
            raise ValueError(
                f"model.dropping.keep={self.dropping.keep}: what layers of "
                f"{self.feed_forward_type!r} leave for objectives is of all tokens; set "
                "model.feed_forward_type='dense', or keep to 1"
            )
        if gridded := [name for name, each in self.patterns.items() if each.grid]:
            raise ValueError(
                f"model.dropping.keep={self.dropping.keep}: what is left of {gridded[0]} is no "
                f"grid of patches; set model.sparse.{gridded[0]}.grid=0, or keep to 1"
            )
        if self.exits:
            raise ValueError(
                f"model.dropping.keep={self.dropping.keep}: layers that drop tokens leave nothing "
                "for the losses of exits; set model.exits=(), or keep to 1"
            )
        if self.pipeline:
            raise ValueError(
                f"model.dropping.keep={self.dropping.keep}: a pipeline's stages have one length of "
                "sequence; set mesh.stage=1, or keep to 1"
            )

    def own(self, name: str, otherwise: Any) -> Any:
        """Returns a field of the kind of feed-forward, `otherwise` if it has no such field."""
        return kind_option(self.make_feed_forward, name, otherwise)

    def of_block(self, number: int) -> TransformerOptions:
        """Returns the options of a block of each period: its feed-forward may be dense."""
        if (number + 1) % self.own("every", 1) == 0:
            return self
        return replace(self, feed_forward_type="dense", feed_forward_options=())

    @classmethod
    def config_fields(cls) -> tuple[str, ...]:
        """Returns the names of the fields that `config.model` has under the same names."""
        inference = ("unstacked", "cache", "gathered")
        elsewhere = (*inference, "counted", "cross", "dropping", "pipeline")
        return tuple(each.name for each in fields(cls) if each.init and each.name not in elsewhere)

    @classmethod
    def from_config(cls, model: Mapping[str, Any]) -> TransformerOptions:
        """Returns the options of the main stack, from the fields of `config.model` of these names.

        Raises:
          ValueError: a value is not allowed, or values do not fit together.
        """
        known = {name: model[name] for name in cls.config_fields()}
        known |= frozen({name: known[name] for name in OWN_OPTIONS})
        known = read_options(cls, known, "model")
        try:
            known["dtype"] = jnp.dtype(dtype_on(platform(), known["dtype"]))
        except TypeError as error:
            raise ValueError(f"model.dtype={known['dtype']!r} is no type of number") from error
        return cls(**known)

    def changed(self, changes: Mapping[str, Any]) -> TransformerOptions:
        """Returns the options with other values; None, or a size of 0, leaves a value as it is.

        Another kind of block or feed-forward has none of the own options of the one before.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        for kind in ("block", "feed_forward_type"):
            if given.get(kind, getattr(self, kind)) != getattr(self, kind):
                given.setdefault(f"{kind.removesuffix('_type')}_options", {})
        given |= frozen({name: given[name] for name in OWN_OPTIONS if name in given})
        for name in ("width", "layers", "heads", "feed_forward"):
            if not given.get(name):
                given.pop(name, None)
        return replace(self, **given)
