"""The transformer block and the scanned stack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import checkpoint_policies as policies
from jaxtyping import Array, Bool, Float

from unified_mm.nn.attention.attention import Attention, AttentionPlan
from unified_mm.nn.attention.cache import LayerKV
from unified_mm.nn.attention.cross_attention import GatedCrossLayer
from unified_mm.nn.layers import PRODUCT, Norm
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.pipeline import Pipeline, run_pipeline
from unified_mm.nn.sow import (
    ATTENTION,
    AUXILIARY,
    EMBEDDED,
    RESIDUAL,
    auxiliary_left,
    check_auxiliary,
    sow_auxiliary,
)
from unified_mm.nn.tokens import spans
from unified_mm.nn.unstack import LAYERS
from unified_mm.parallel.sharding import constrain

# By name of each layer of a period, its keys and values; in an unstacked stack, a tuple of these.
PeriodKV = dict[str, Any]
CROSS = "cross"
# Begins the names of what periods sow for exits, one for each group of tokens, and of the scopes
# of the layers after each exit, `exit_LAYER`, which run where not all have left.
EXIT = "exit"
LEFT = "left"  # the collection of which examples have left after each exit
# Residual stream [B, N, D] after an exit -> bool [B], which examples leave there.
Leave = Callable[[Array], Array]

# How the backward pass recomputes what `TransformerOptions.remat` says (Chen et al. 2016, "Training
# deep nets with sublinear memory cost"). Under a scan nothing can be merged with the first
# computation.
RECOMPUTED: dict[str, dict[str, Any]] = {
    name: {"prevent_cse": False, "policy": policy}
    for name, policy in {
        "full": policies.nothing_saveable,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
        ),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }.items()
}


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    The norm comes before each (Xiong et al. 2020) or after the sum (Vaswani et al. 2017).
    """

    options: TransformerOptions
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], plan: AttentionPlan, cached: LayerKV | None
    ) -> tuple[Float[Array, "B N D"], LayerKV]:
        o = self.options
        dropout = nn.Dropout(o.dropout, deterministic=self.deterministic)
        attention = Attention(o, name="attention")
        feed_forward = o.make_feed_forward(options=o, name="feed_forward")
        norm = partial(Norm, o.norm, o.norm_epsilon, o.dtype)
        attention_norm = norm(name="attention_norm")
        feed_forward_norm = norm(name="feed_forward_norm")
        if o.norm_place == "pre":
            y, kv = attention(attention_norm(x), plan, cached)
            x = x + dropout(y)
            x = x + dropout(feed_forward(feed_forward_norm(x), plan))
        else:
            y, kv = attention(x, plan, cached)
            x = attention_norm(x + dropout(y))
            x = feed_forward_norm(x + dropout(feed_forward(x, plan)))
        return constrain(x, "batch", "length", "activation"), kv


def rounded(options: TransformerOptions, layers: Any, shardings: Any) -> Any:
    """Returns a stack's parameters with the kernels of its blocks rounded to what these compute in.

    Each `Dense` rounds its own. Where all layers' are rounded at once, so are their gradients,
    products in that type, which take half of the memory together. Kernels that a layer uses for
    several groups of tokens, or a pipeline for several micro-batches, stay as they are: their
    gradients are sums. So do those of kinds of layers that are not known here.

    Args:
      options: of the stack.
      layers: parameters of the scanned periods, each of all periods; None where they are frozen.
      shardings: their shardings, which the compiler would not find by itself.
    """
    if options.dtype == jnp.float32 or options.pipeline or options.block != "transformer":
        return layers
    parts = {"attention"} if not options.separate_attention else set()
    if options.feed_forward_type == "dense" and not options.separate_feed_forward:
        parts.add("feed_forward")

    def cast(path: Any, kernel: Array, sharding: Any) -> Array:
        names = [each.key for each in path]
        if names[-1] != "kernel" or (names[0] != CROSS and names[1] not in parts):
            return kernel
        return jax.lax.with_sharding_constraint(kernel.astype(options.dtype), sharding)

    return jax.tree_util.tree_map_with_path(cast, layers, shardings)


class Period(nn.Module):
    """The repeated part of a stack: n blocks, or one gated cross layer and n blocks."""

    options: TransformerOptions
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        plan: AttentionPlan,
        cross: AttentionPlan | None,
        cached: PeriodKV,
        left: Bool[Array, " B"] | bool = False,
    ) -> tuple[Float[Array, "B N D"], PeriodKV]:
        """Runs the period on the examples that have not left; of the others it keeps x.

        Where all have `left` (True), only keys and values are computed: the compiler drops the
        rest, which nothing uses.
        """
        o = self.options
        leaving = self.is_mutable_collection(AUXILIARY)
        before = auxiliary_left(self) if leaving else {}
        kv: PeriodKV = {}
        if cross is not None:
            layer = GatedCrossLayer(o, name=CROSS)
            y, kv[CROSS] = layer(x, cross, cached.get(CROSS))
            x = unless_left(left, x, y)
            if not self.is_initializing():
                self.sow(RESIDUAL, f"after_{CROSS}", x)
        for number in range(o.blocks_per_period):
            name = f"block_{number}"
            own = o.of_block(number)
            block = o.make_block(options=own, deterministic=self.deterministic, name=name)
            y, kv[name] = block(x, plan, cached.get(name))
            x = unless_left(left, x, y)
            if not self.is_initializing():
                self.sow(RESIDUAL, f"after_{name}", x)
        if leaving:
            if o.exits:
                for name, span in spans(plan.groups).items():
                    sow_auxiliary(self, f"{EXIT}:{name}", x[:, span])
            check_auxiliary(self, before, x.shape[0])
        return x, kv


def unless_left(
    left: Bool[Array, " B"] | bool, x: Float[Array, "B N D"], y: Float[Array, "B N D"]
) -> Float[Array, "B N D"]:
    """Returns y, but x of the examples that have left."""
    if isinstance(left, bool):
        return x if left else y
    return jnp.where(left[:, None, None], x, y)


class Transformer(nn.Module):
    """Periods, whose parameters are stacked [periods, ...], run under a scan; then a norm.

    Layer l is block `l % n` of period `l // n`, for n blocks per period.
    """

    options: TransformerOptions

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        plan: AttentionPlan,
        cached: PeriodKV | None = None,
        *,
        cross: AttentionPlan | None = None,
        deterministic: bool = True,
        leave: Leave | None = None,
        span: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "B N D"], PeriodKV]:
        """Runs the stack.

        Args:
          x: embeddings.
          plan: masks and positions.
          cached: keys and values of earlier tokens, into which the new ones are written.
          cross: of the gated cross layers, where the stack has any.
          deterministic: whether there is no dropout.
          leave: which examples leave after each of `options.exits`; None runs all layers.
          span: bounds of the periods to run; None runs all. The norm follows the last one.

        Returns:
          Contextual embeddings [B, N, D], and keys and values, each [periods, B, G, K, A], or with
          `options.unstacked` a tuple by period, each [B, G, K, A]. Without `cached` they are those
          that `plan.keep` asks for.
        """
        o = self.options
        plan = plan.replace(deterministic=deterministic)  # type: ignore[attr-defined]
        x = constrain(x, "batch", "length", "activation")
        if not self.is_initializing():
            self.sow(RESIDUAL, EMBEDDED, x)
        cached = cached or {}
        if leave is not None and not (o.unstacked and deterministic):
            # With stacked parameters each conditional would copy its layers: four times the time.
            raise ValueError("layers are left early where they are unstacked and nothing is drawn")
        if span is not None and not self.is_initializing():
            self._refuse_to_be_shown()
        if leave is not None:
            x, kv = self._leaving(leave, x, plan, cross, cached)
        elif o.unstacked:
            x, kv = self._one_by_one(x, plan, cross, cached, deterministic, span)
        elif span is not None and not self.is_initializing():
            x, kv = self._part(span, x, plan, cross, cached, deterministic)
        elif o.pipeline and not self.is_initializing():
            x, kv = self._pipelined(o.pipeline, x, plan, cross, cached, deterministic)
        else:
            layers = nn.scan(
                Period if o.remat == "none" else nn.remat(Period, **RECOMPUTED[o.remat]),
                variable_axes={"params": 0, ATTENTION: 0, RESIDUAL: 0, AUXILIARY: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=o.periods,
                unroll=o.unroll if o.remat == "none" else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, kv = layers(o, deterministic, name=LAYERS)(x, plan, cross, cached)
            if span is not None:  # parameters are those of the whole stack
                kv = jax.tree.map(lambda each: each[slice(*span)], kv)
        if o.final_norm and (span is None or span[1] == o.periods or self.is_initializing()):
            x = Norm(o.norm, o.norm_epsilon, o.dtype, name="norm")(x)
        return x, kv

    def _one_by_one(
        self,
        x: Array,
        plan: AttentionPlan,
        cross: Any,
        cached: PeriodKV,
        deterministic: bool,
        span: tuple[int, int] | None,
    ) -> tuple[Array, PeriodKV]:
        """Runs the periods of an unstacked stack; keys and values are tuples of [B, G, K, A]."""
        kv: dict[str, list[Any]] = {}
        for number in range(*(span or (0, self.options.periods))):
            period = Period(self.options, deterministic, name=f"{LAYERS}_{number}")
            own = {name: each[number] for name, each in cached.items()}
            x, new = period(x, plan, cross, own)
            for name, pair in new.items():
                kv.setdefault(name, []).append(pair)
        return x, {name: tuple(each) for name, each in kv.items()}

    def _leaving(
        self, leave: Leave, x: Array, plan: AttentionPlan, cross: Any, cached: PeriodKV
    ) -> tuple[Array, PeriodKV]:
        """Runs an unstacked stack, of which an example leaves after the first exit that lets it.

        Layers are skipped where all have left. An example that has left keeps its state, of which
        the later layers compute keys and values, so that later tokens find them (Schuster et al.
        2022, "Confident adaptive language modeling", section 3.2): nothing of it depends on others.
        """
        o = self.options
        period = Period(o, True, parent=None)
        layers: list[tuple[Any, PeriodKV]] = [
            (
                self.get_variable("params", f"{LAYERS}_{number}"),
                {name: each[number] for name, each in cached.items()},
            )
            for number in range(o.periods)
        ]
        exits = [layer // o.blocks_per_period for layer in o.exits]
        left = jnp.zeros(x.shape[0], bool)
        gone = jnp.zeros((x.shape[0], len(exits)), bool)
        kv: list[PeriodKV] = []
        for first, last in pairwise((0, *exits, o.periods)):
            own = layers[first:last]

            def through(x: Any, left: Any, own: Any = own) -> tuple[Any, list[PeriodKV]]:
                found: list[Any] = []
                for params, cached in own:
                    y: Any = period.apply({"params": params}, x, plan, cross, cached, left)
                    x = y[0]
                    found.append(y[1])
                return x, found

            def run(x: Array, left: Array, through: Any = through, last: int = last) -> Any:
                x, found = through(x, left)
                return x, left if last == o.periods else left | leave(x), found

            def skip(x: Array, left: Array, through: Any = through) -> Any:
                return x, left, through(x, True)[1]

            done: Any
            if first:
                gone = gone.at[:, exits.index(first)].set(left)
                with jax.named_scope(f"{EXIT}_{first * o.blocks_per_period}"):
                    done = jax.lax.cond(left.all(), skip, run, x, left)
            else:  # all go through the layers before the first exit
                done = run(x, left)
            x, left = done[:2]
            kv += done[2]
        self.sow(LEFT, "exits", gone)
        return x, {name: tuple(each[name] for each in kv) for name in kv[0]}

    def normed(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Returns what the final norm makes of a residual stream, such as that after an exit."""
        o = self.options
        if not o.final_norm:
            return x
        norm = Norm(o.norm, o.norm_epsilon, o.dtype, parent=None)
        normed: Any = norm.apply({"params": self.variables["params"]["norm"]}, x)
        return normed

    def _pipelined(
        self,
        pipeline: Pipeline,
        x: Array,
        plan: AttentionPlan,
        cross: Any,
        cached: PeriodKV,
        deterministic: bool,
    ) -> tuple[Array, PeriodKV]:
        """Runs the periods as a pipeline of stages, on the same parameters as the scan."""
        period, layers = self._period_function(deterministic)
        together = self.options.own("group", 1)
        x, (kv, left) = run_pipeline(
            pipeline, period, layers, cached, x, (plan, cross), together=together
        )
        if left:
            before: Any = self.get_variable(AUXILIARY, LAYERS, {})
            self.put_variable(AUXILIARY, LAYERS, after_what_is_left(before, left))
        return x, kv

    def _part(
        self,
        span: tuple[int, int],
        x: Array,
        plan: AttentionPlan,
        cross: Any,
        cached: PeriodKV,
        deterministic: bool,
    ) -> tuple[Array, PeriodKV]:
        """Runs some of the periods, on the same parameters as the scan of all."""
        period, layers = self._period_function(deterministic)
        part = jax.tree.map(lambda each: each[slice(*span)], layers)

        def step(x: Array, one: Any) -> tuple[Array, Any]:
            layer, cached = one
            x, (kv, _) = period(layer, cached, x, (plan, cross), jnp.zeros((), jnp.int32))
            return x, kv

        return jax.lax.scan(step, x, (part, cached))

    def _refuse_to_be_shown(self) -> None:
        """Raises ValueError if what layers attend to or hold is asked of some of the periods."""
        for collection in (ATTENTION, RESIDUAL):
            if self.is_mutable_collection(collection):
                raise ValueError(
                    f"the {collection} of a stack that drops tokens (model.dropping) cannot be "
                    "shown: its layers have sequences of different lengths"
                )

    def _period_function(self, deterministic: bool) -> tuple[Any, Any]:
        """Returns a period as a function of its parameters, and those of all periods, stacked.

        What layers leave is in the second value that it returns, beside keys and values.
        """
        o = self.options
        module = Period(o, deterministic, parent=None)
        leaving = self.is_mutable_collection(AUXILIARY)
        drawing = not deterministic and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), o.periods) if drawing else None

        def period(
            layer: Any, cached: PeriodKV, x: Array, beside: Any, number: Array
        ) -> tuple[Array, Any]:
            params, key = layer
            rngs = {"dropout": jax.random.fold_in(key, number)} if drawing else {}
            plan, cross = beside
            mutable = [AUXILIARY] if leaving else False
            found: Any = module.apply(
                {"params": params}, x, plan, cross, cached, rngs=rngs, mutable=mutable
            )
            (x, kv), left = found if leaving else (found, {})
            return x, (kv, left.get(AUXILIARY, {}))

        layers: Any = (self.get_variable("params", LAYERS), keys)
        if o.remat != "none":
            period = jax.checkpoint(period, **RECOMPUTED[o.remat])
        return period, layers


def after_what_is_left(before: Any, left: Any) -> Any:
    """Returns what modules left in an earlier call with what they leave now, as `sow` keeps it."""
    if isinstance(left, tuple):
        return (*before, *left) if before else left
    return {name: after_what_is_left(before.get(name, {}), each) for name, each in left.items()}
