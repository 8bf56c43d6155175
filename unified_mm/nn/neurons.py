"""A feed-forward of which each picture uses a few neurons.

In training those count that are most active over a picture's tokens, the others are masked; beside
it a small predictor learns to name them from the mean of the tokens (Liu et al. 2023, "Deja vu").
At inference it names them first, and only their rows of the kernels are gathered and computed with.
One set for all tokens of a picture is what saves time: a set for each token costs more than all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from unified_mm.config import check_options, option
from unified_mm.nn.attention.attention import AttentionPlan
from unified_mm.nn.dropping import kept_of
from unified_mm.nn.feed_forward import ACTIVATIONS, WHERE, Mlp
from unified_mm.nn.layers import Choosing
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.quantized import Quantized
from unified_mm.nn.routing import choose
from unified_mm.nn.sow import AUXILIARY, sow_auxiliary

NEURONS = "neurons"  # begins the names of what the layers sow


class Neurons(nn.Module):
    """A dense feed-forward, of which some modalities use a share: [B, N, D] -> [B, N, D].

    Its parameters lie where those of a dense one do, and the predictors beside them.

    Attributes:
      options: of the stack.
      share: of the F neurons that a picture, or other token group, uses; rounded up.
      of: the modalities that use so few.
      rank: hidden width of the predictor.
    """

    options: TransformerOptions
    share: float = option(0.2, above=0, most=1)
    of: tuple[str, ...] = ("image",)
    rank: int = option(32, least=1)

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], plan: AttentionPlan) -> Float[Array, "B N D"]:
        check_options(self, WHERE)
        if "text" in self.of:
            raise ValueError(
                f"{WHERE}.of={self.of}: a text is written token by token, and which neurons it "
                "uses is known at its end alone; leave 'text' out"
            )
        for number, group in enumerate(plan.groups):
            if group.modality in self.of and plan.reads_in_order(number):
                raise ValueError(
                    f"{WHERE}.of={self.of}: tokens of {group.modality} are read in order here "
                    "(documents, or the rule 'causal'), and earlier ones would depend on later "
                    f"ones: leave {group.modality!r} out"
                )
        return ByGroup(self.options, self.share, self.of, self.rank, name="mlp")(x, plan)


class ByGroup(nn.Module):
    """The feed-forward of each token group, with all neurons or the few of `Neurons`."""

    options: TransformerOptions
    share: float
    of: tuple[str, ...]
    rank: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], plan: AttentionPlan) -> Float[Array, "B N D"]:
        o = self.options
        room = kept_of(o.feed_forward, self.share)
        mlps: dict[str, Mlp] = {}
        predictors: dict[str, Predictor] = {}
        parts = []
        for number, group in enumerate(plan.groups):
            name = group.modality if o.separate_feed_forward else "shared"
            if name not in mlps:
                mlps[name] = Mlp(o, name=name)
            span = plan.span_of(number)
            part, valid = x[:, span], plan.valid[:, span]
            if group.modality not in self.of:
                parts.append(mlps[name](part))
                continue
            if group.modality not in predictors:
                predictors[group.modality] = Predictor(o, self.rank, name=f"of_{group.modality}")
            logits = predictors[group.modality](part, valid)
            if o.gathered and not self.is_initializing():
                kernels: Any = self.get_variable("params", name)
                parts.append(with_few(o, kernels, part, highest(logits, room)))
            else:
                few = partial(self._most_active, logits, valid, room)
                parts.append(mlps[name](part, few))
        return jnp.concatenate(parts, axis=1)

    def _most_active(
        self,
        logits: Float[Array, "B F"],
        valid: Bool[Array, "B N"],
        room: int,
        hidden: Float[Array, "B N F"],
    ) -> Float[Array, "B N F"]:
        """Masks all but the neurons that are most active over the valid tokens of each example."""
        activity = jnp.where(valid[..., None], jnp.abs(hidden), 0).astype(jnp.float32).sum(1)
        chosen = highest(activity, room)
        used = members(chosen, hidden.shape[-1])
        if self.is_mutable_collection(AUXILIARY) and not self.is_initializing():
            target = used.astype(jnp.float32)
            loss = optax.sigmoid_binary_cross_entropy(logits, target).mean(-1)
            named = members(highest(logits, room), hidden.shape[-1])
            found = (used & named).astype(jnp.float32).mean(-1) * (hidden.shape[-1] / room)
            seen = valid.any(-1)
            left = jnp.stack([jnp.where(seen, each, 0) for each in (loss, found)], -1)
            sow_auxiliary(
                self, NEURONS, jnp.concatenate([left, seen[:, None].astype(jnp.float32)], -1)
            )
        return jnp.where(used[:, None], hidden, 0)


class Predictor(nn.Module):
    """Names a picture's neurons from the mean of its tokens; no gradient goes back to these."""

    options: TransformerOptions
    rank: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B F"]:
        """Returns a logit for each neuron."""
        x = jnp.where(valid[..., None], jax.lax.stop_gradient(x), 0).astype(jnp.float32)
        mean = x.sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1).astype(jnp.float32)
        hidden = jax.nn.gelu(Choosing((self.rank,), ("embed",), (None,), name="narrow")(mean))
        wide = (self.options.feed_forward,)
        return Choosing(wide, (None,), ("feed_forward",), name="wide")(hidden)


def highest(scores: Float[Array, "B F"], room: int) -> Int[Array, "B room"]:
    """Returns the numbers of each row's highest scores, in ascending order."""
    every = jnp.ones(scores.shape[1], bool)
    found = jax.vmap(lambda row: choose(row[:, None], room, "score", every)[0])(scores)
    return jnp.sort(found, axis=1)


def members(numbers: Int[Array, "B room"], count: int) -> Bool[Array, "B count"]:
    """Returns which of `count` each row's numbers hold."""
    return jax.vmap(lambda row: jnp.zeros(count, bool).at[row].set(True))(numbers)


def with_few(
    o: TransformerOptions,
    params: Mapping[str, Any],
    x: Float[Array, "B N D"],
    neurons: Int[Array, "B room"],
) -> Float[Array, "B N D"]:
    """Computes an MLP with some of its neurons.

    Args:
      o: options of the stack.
      params: of an `Mlp`.
      x: tokens.
      neurons: those that each example uses.
    """

    def widened(name: str) -> Array:
        kernel = floats(params[name]["kernel"])[:, neurons].astype(o.dtype)
        y = jnp.einsum("BND,DBF->BNF", x.astype(o.dtype), kernel)
        return y + bias_of(name, neurons)

    def bias_of(name: str, *at: Array) -> Any:
        if not o.feed_forward_bias:
            return jnp.zeros((), o.dtype)
        bias = floats(params[name]["bias"]).astype(o.dtype)
        return bias[at[0]][:, None] if at else bias

    act = ACTIVATIONS[o.activation]
    hidden = act(widened("gate")) * widened("up") if o.gated_feed_forward else act(widened("up"))
    kernel = floats(params["down"]["kernel"])[neurons].astype(o.dtype)
    return jnp.einsum("BNF,BFD->BND", hidden, kernel) + bias_of("down")


def floats(x: Any) -> Float[Array, "..."]:
    """Returns a parameter, of int8 its floats."""
    return x.floats() if isinstance(x, Quantized) else jnp.asarray(x)
