"""Mixture of experts: a feed-forward of which each token uses a few parts (Shazeer et al. 2017).

A router chooses for each token K of E experts, each of which has room for `capacity` times its even
share; a token that finds none keeps its residual stream alone. Room is counted for each token group
apart (a picture, each text), by groups of a fixed number of examples: two texts of one pass would
otherwise tell of each other by who is dropped. Text is served in order of place, so that no token
depends on a later one. Where nothing is drawn, as at inference, no example depends on another, and
nothing is dropped unless `evaluation_capacity` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from unified_mm.config import check_options, option
from unified_mm.nn.attention.attention import AttentionPlan
from unified_mm.nn.feed_forward import ACTIVATIONS, WHERE, Mlp
from unified_mm.nn.layers import PRODUCT, Choosing, partitioned, product
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.quantized import Quantized
from unified_mm.nn.routing import choose, gather, into_blocks, rounded_up, scatter_add
from unified_mm.nn.sow import AUXILIARY, sow_auxiliary
from unified_mm.parallel.sharding import constrain

BLOCK = 128  # rows of a block at most, where nothing is dropped
ROUTING = "routing"  # begins the names of what the layers sow
Weights = Mapping[
    str, tuple[Any, Any]
]  # of each map: kernels [E, ...], and biases [E, ...] or None


@struct.dataclass
class Routed:
    """A group of tokens on its way to the experts of a pool.

    Attributes:
      x: [B, N, D].
      valid: bool [B, N].
      logits, probabilities: of the router, float32 [B, N, E].
      scores: [B, N, E], as `choose` takes them.
      chosen: bool [B, N, E], the experts that a token asks for.
      modality: of the tokens; static.
      order: as in `Experts`; static.
      group: how many examples share the room; static.
      capacity: room of an expert as a multiple of its even share, 0 for all that ask; static.
    """

    x: Any
    valid: Any
    logits: Any
    probabilities: Any
    scores: Any
    chosen: Any
    modality: str = struct.field(pytree_node=False)
    order: str = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    capacity: float = struct.field(pytree_node=False)


class Experts(nn.Module):
    """Experts in place of the feed-forward: [B, N, D] -> [B, N, D].

    Attributes:
      options: of the stack; `feed_forward` is the width F of each expert.
      count: E, experts of a pool.
      top_k: K, experts of a token.
      every: the experts stand in the last of every so many blocks; the others are dense.
      by: 'all', one pool for all tokens, or 'modality', a pool of its own for each.
      capacity: room of an expert in training, as a multiple of its even share of all choices.
      evaluation_capacity: the same where nothing is drawn, in losses that are evaluated and at
        inference, for the tokens of a context in each example by itself; 0 drops nothing. Of text
        nothing is dropped there: it is written token by token.
      dropless: whether nothing is dropped in training either.
      drop_text: whether text is dropped in training, where its experts are full. Served by place,
        it is the ends of texts that are dropped, which are then written badly.
      group: how many neighbouring examples of a batch share the room.
      order: who comes first among the tokens of a context: 'place'; 'priority', the surest choice
        of the group's pictures, all first choices before second ones (Riquelme et al. 2021, batch
        priority); 'choice', each expert takes the tokens of one picture that suit it best (Zhou et
        al. 2022). Text comes in order of place.
      gate: what an expert's output is multiplied by, for the router's probability p: 'scaled',
        E p / K, about 1 from scratch; 'normalised', p divided by the sum over the chosen, which is
        kept from the gradient: exactly 1 together, for experts that begin as copies of one.
      noise: standard deviation of what is added to the router's logits in training, times 1 / E.
      shared: whether all tokens go through one expert more (DeepSeekMoE).
      bias_balance: whether a bias that balances the loads is added where experts are chosen
        (Wang et al. 2024, "Auxiliary-loss-free load balancing").
    """

    options: TransformerOptions
    count: int = option(8, least=1)
    top_k: int = option(1, least=1)
    every: int = option(1, least=1)
    by: str = option("all", choices=("all", "modality"))
    capacity: float = option(1.25, above=0, below=math.inf)
    evaluation_capacity: float = option(0.0, least=0, below=math.inf)
    dropless: bool = False
    drop_text: bool = True
    group: int = option(1, least=1)
    order: str = option("place", choices=("place", "priority", "choice"))
    gate: str = option("scaled", choices=("scaled", "normalised"))
    noise: float = option(1.0, least=0, below=math.inf)
    shared: bool = False
    bias_balance: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], plan: AttentionPlan) -> Float[Array, "B N D"]:
        leaving = self.is_mutable_collection(AUXILIARY) and not self.is_initializing()
        sharing = not (plan.deterministic or self.dropless or self.is_initializing())
        group = self.group if leaving or (sharing and plan.write_at is None) else 1
        self._check(x.shape[0], group)
        x = constrain(x, "batch", None, "activation")
        pools: dict[str, list[int]] = {}
        parts: dict[int, Array] = {}
        for number, each in enumerate(plan.groups):
            if not each.length:  # the one token of a picture that stands within the text
                parts[number] = x[:, :0]
                continue
            name = "all" if self.by == "all" else each.modality
            pools.setdefault(name, []).append(number)
        for name, numbers in pools.items():
            routed = self._route(name, x, plan, numbers, group)
            weights = ExpertMlp(self.options, self.count, name=f"experts_{name}")()
            outputs, taken = self._computed(weights, routed, group)
            parts |= zip(numbers, outputs, strict=True)
            if leaving:
                self._sow(name, routed, taken, group)
        y = jnp.concatenate([parts[number] for number in range(len(plan.groups))], axis=1)
        if self.shared:
            y = y + Mlp(self.options, name="shared_expert")(x)
        return y

    def _capacity(self, plan: AttentionPlan, modality: str) -> float:
        """Returns the room of an expert as a multiple of its even share; 0 drops nothing."""
        # With a cache, tokens come a few at a time: their group is never seen as a whole.
        if plan.write_at is not None:
            return 0.0
        if plan.deterministic:
            return 0.0 if modality == "text" else self.evaluation_capacity
        kept = self.dropless or (modality == "text" and not self.drop_text)
        return 0.0 if kept else self.capacity

    def _check(self, rows: int, group: int) -> None:
        check_options(self, WHERE)
        if self.top_k > self.count:
            raise ValueError(
                f"{WHERE}.top_k={self.top_k} experts of a token, but there are count={self.count}"
            )
        if self.options.separate_feed_forward:
            raise ValueError(
                f"model.separate_feed_forward: experts have no such parts; set {WHERE}.by="
                "'modality'"
            )
        if rows % group:
            raise ValueError(
                f"{WHERE}.group={group} examples share an expert's room, and do not divide "
                f"the {rows} examples of a pass"
            )

    def _route(
        self,
        name: str,
        x: Float[Array, "B N D"],
        plan: AttentionPlan,
        numbers: Sequence[int],
        group: int,
    ) -> list[Routed]:
        """Returns the token groups `numbers` with what the router of a pool says of each."""
        router = Choosing(
            (self.count,), ("embed",), (None,), scale=0.2, use_bias=False, name=f"router_{name}"
        )
        bias: Any = 0.0
        if self.bias_balance:
            zeros = partitioned(nn.initializers.zeros, None)
            bias = jax.lax.stop_gradient(self.param(f"balance_{name}", zeros, (self.count,)))
        found = []
        for number in numbers:
            modality = plan.groups[number].modality
            span = plan.span_of(number)
            logits = router(x[:, span].astype(jnp.float32))
            if self.noise and not plan.deterministic:
                drawn = jax.random.normal(self.make_rng("dropout"), logits.shape)
                logits = logits + self.noise / self.count * drawn
            probabilities = jax.nn.softmax(logits)
            order = "place" if modality == "text" else self.order
            if order != "place" and plan.reads_in_order(number):
                raise ValueError(
                    f"{WHERE}.order={order!r}: tokens of {modality} are read in order here "
                    "(documents, or the rule 'causal'), and earlier ones would depend on later "
                    "ones: set it to 'place'"
                )
            scores, chosen = by_choices(probabilities, bias, self.top_k)
            if order == "choice":
                scores = probabilities
            found.append(
                Routed(
                    x[:, span],
                    plan.valid[:, span],
                    logits,
                    probabilities,
                    scores,
                    chosen,
                    modality,
                    order,
                    1 if plan.deterministic or order == "choice" else group,
                    self._capacity(plan, modality),
                )
            )
        return found

    def _gates(self, routed: Routed, chosen: Bool[Array, "B N E"]) -> Float[Array, "B N E"]:
        """Returns what the output of each expert is multiplied by for each token."""
        p = routed.probabilities
        if self.gate == "scaled":
            return p * (self.count / self.top_k)
        total = jnp.where(chosen, p, 0).sum(-1, keepdims=True)
        return p / jax.lax.stop_gradient(jnp.where(total > 0, total, 1))

    def _computed(
        self, weights: Weights, routed: Sequence[Routed], group: int
    ) -> tuple[list[Array], list[Array]]:
        """Returns the output of each token group, and which experts took each of its tokens."""
        outputs: dict[int, Array] = {}
        taken: dict[int, Array] = {}
        limited: dict[int, Dispatched] = {}
        whole: dict[int, tuple[Array, Array, Array]] = {}
        for number, r in enumerate(routed):
            if not r.capacity and r.order != "choice":
                taken[number] = r.chosen & r.valid[..., None]
                whole[number] = r.x, taken[number], self._gates(r, r.chosen)
                continue
            # Experts that choose have a room at inference too: it is within one picture.
            even = r.group * r.x.shape[1] * self.top_k / self.count
            slots = slots_of(r, rounded_up(even * (r.capacity or self.capacity)))
            taken[number] = taken_of(slots, r)
            gates = self._gates(r, taken[number] if r.order == "choice" else r.chosen)
            slots = joined(slots, r.x.shape[1] * r.group, group // r.group)
            limited[number] = Dispatched(by_group(r.x, group), by_group(gates, group), slots)
        if whole:
            run = by_share(self.options, partial(without_drops, self.options, self.top_k))
            outputs |= zip(whole, run(weights, list(whole.values())), strict=True)
        if limited:
            found = with_room(self.options, weights, list(limited.values()))
            for number, y in zip(limited, found, strict=True):
                outputs[number] = y.reshape(routed[number].x.shape)
        numbers = range(len(routed))
        return [outputs[i] for i in numbers], [taken[i] for i in numbers]

    def _sow(self, pool: str, routed: Sequence[Routed], taken: Sequence[Array], group: int) -> None:
        """Sows the statistics of a pool, of all its tokens and by modality."""
        bias: Any = self.get_variable("params", f"balance_{pool}") if self.bias_balance else None
        for name in dict.fromkeys(("", *(r.modality for r in routed))):
            of = [i for i, r in enumerate(routed) if name in ("", r.modality)]
            found: Any = sum(statistics(routed[i], taken[i], bias) for i in of)
            # Every example says what its group has, so that a mean over examples is one of groups.
            groups = by_group(found, group)
            alike = jnp.broadcast_to(groups.mean(1, keepdims=True), groups.shape)
            sow_auxiliary(self, f"{ROUTING}:{pool}:{name}", alike.reshape(found.shape))


def by_choices(
    probabilities: Float[Array, "B N E"], bias: Any, most: int
) -> tuple[Float[Array, "B N E"], Bool[Array, "B N E"]]:
    """Returns which experts each token asks for, and with what score.

    A first choice scores higher than any second one, and a surer token higher than another.
    """
    # Rounds of argmax: unlike `top_k`, a mesh divides it along the batch.
    left = jax.lax.stop_gradient(probabilities) + bias
    sure = jax.lax.stop_gradient(probabilities).max(-1, keepdims=True)
    scores = jnp.full(left.shape, -jnp.inf)
    for number in range(most):
        best = jax.nn.one_hot(left.argmax(-1), left.shape[-1], dtype=bool)
        scores = jnp.where(best, sure - number, scores)
        left = jnp.where(best, -jnp.inf, left)
    return scores, scores > -jnp.inf


def by_group(x: Float[Array, "B ..."], group: int) -> Float[Array, "groups ..."]:
    """Returns [B, N, ...] as [groups, group * N, ...]; [B, E] as [groups, group, E]."""
    if x.ndim == 2:
        return x.reshape(-1, group, x.shape[1])
    return x.reshape(-1, group * x.shape[1], *x.shape[2:])


def slots_of(routed: Routed, room: int) -> Int[Array, "groups E room"]:
    """Returns the tokens, of those of each group, in the slots of each expert.

    By place the first tokens of all examples come first, so that no token depends on a later one of
    another example.
    """
    group, tokens = routed.group, routed.x.shape[1]
    rows = group * tokens

    def turned(x: Array) -> Array:
        x = x.reshape(-1, group, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(-1, rows, *x.shape[3:])

    order = "place" if routed.order == "place" else "score"
    room = min(room, rows)
    scores, valid = turned(routed.scores), turned(routed.valid)
    slots = jax.vmap(lambda scores, valid: choose(scores, room, order, valid))(scores, valid)
    return jnp.where(slots < rows, slots % group * tokens + slots // group, rows)


def joined(
    slots: Int[Array, "groups E room"], rows: int, count: int
) -> Int[Array, "larger E more"]:
    """Returns the slots of `count` neighbouring groups of so many rows as those of one group."""
    shared = slots.reshape(-1, count, *slots.shape[1:])
    moved = shared + rows * jnp.arange(count)[:, None, None]
    moved = jnp.where(shared < rows, moved, rows * count).swapaxes(1, 2)
    return moved.reshape(*moved.shape[:2], -1)


def taken_of(slots: Int[Array, "groups E room"], routed: Routed) -> Bool[Array, "B N E"]:
    """Returns which experts took which token."""
    groups, experts, _ = slots.shape
    rows = routed.group * routed.x.shape[1]
    where = jnp.arange(groups)[:, None, None], slots, jnp.arange(experts)[:, None]
    taken = jnp.zeros((groups, rows, experts), bool).at[where].set(True, mode="drop")
    return taken.reshape(*routed.x.shape[:2], experts)


@struct.dataclass
class Dispatched:
    """The tokens of groups, and the slots that they are sent to.

    Attributes:
      x: [groups, N, D].
      gates: float32 [groups, N, E].
      slots: int32 [groups, E, room].
    """

    x: Any
    gates: Any
    slots: Any


def with_room(
    options: TransformerOptions, weights: Weights, parts: Sequence[Dispatched]
) -> list[Float[Array, "groups N D"]]:
    """Returns what experts make of the tokens in their slots, added up by token.

    Tokens go to the devices of their experts in one exchange, and back in another.
    """
    sent = jnp.concatenate([jax.vmap(gather)(part.x, part.slots) for part in parts], axis=2)
    sent = constrain(sent, "batch", None, None, "activation").swapaxes(0, 1)
    sent = constrain(sent, "experts", "expert_groups", None, "activation")
    experts, groups, room, width = sent.shape
    y = jax.vmap(partial(expert, options))(weights, sent.reshape(experts, groups * room, width))
    y = constrain(y.reshape(sent.shape), "experts", "expert_groups", None, "activation")
    y = constrain(y.swapaxes(0, 1), "batch", None, None, "activation")
    found, first = [], 0
    for part in parts:
        own = y[:, :, first : first + part.slots.shape[2]]
        first += part.slots.shape[2]
        gates = jnp.take_along_axis(part.gates.swapaxes(1, 2), part.slots, axis=2, mode="clip")
        own = own * gates[..., None].astype(own.dtype)
        rows = part.x.shape[1]
        found.append(jax.vmap(partial(scatter_add, rows=rows))(own, part.slots))
    return found


def by_share(
    options: TransformerOptions, function: Callable[..., Array]
) -> Callable[..., list[Array]]:
    """Returns a function of weights and parts of examples, each device's share of them by itself.

    Left alone, the compiler gathers all tokens on each device, as blocks hold any of them. Devices
    along `mesh.expert` run the same tokens, and gather what they share of these.
    """

    def each(weights: Weights, parts: Sequence[tuple[Array, ...]]) -> list[Array]:
        return [function(weights, *part) for part in parts]

    stage, axes = nn.logical_to_mesh_axes(("stages", "expert_groups")) or (None, None)
    mesh = jax.sharding.get_abstract_mesh()
    if axes is None or mesh.size <= 1:
        return each
    # A pipeline maps this along its stages, and only an axis that is named can be mapped.
    named = {stage, *axes} if options.pipeline else {*axes}
    rows = P(axes)
    return jax.shard_map(
        each, in_specs=(P(), rows), out_specs=rows, axis_names=named, check_vma=False
    )


def without_drops(
    options: TransformerOptions,
    most: int,
    weights: Weights,
    x: Float[Array, "B N D"],
    chosen: Bool[Array, "B N E"],
    gates: Float[Array, "B N E"],
) -> Float[Array, "B N D"]:
    """Returns what experts make of all tokens that chose them, block by block."""
    shape = x.shape
    x, chosen, gates = (each.reshape(-1, each.shape[-1]) for each in (x, chosen, gates))
    rows, experts = chosen.shape
    size = min(BLOCK, max(1, rows * most // experts))
    slots, pools = into_blocks(chosen, most, size)

    def one(block: tuple[Array, Array]) -> Array:
        slots, pool = block
        own = jax.tree.map(lambda leaf: leaf[pool], weights)
        y = expert(options, own, gather(x, slots)).astype(gates.dtype)
        return y * gather(gates[:, pool, None], slots)

    # The gradient would keep a copy of an expert's kernels for every block.
    run = one if options.counted else jax.checkpoint(one, prevent_cse=False)
    y = scatter_add(jax.lax.map(run, (slots, pools)).astype(x.dtype), slots, rows)
    return y.reshape(shape)


def expert(
    options: TransformerOptions, weights: Weights, x: Float[Array, "N D"]
) -> Float[Array, "N D"]:
    """Returns what one expert makes of its tokens, as `Mlp` does."""

    def dense(name: str, x: Array) -> Array:
        kernel, bias = weights[name]
        if isinstance(kernel, Quantized):
            y = kernel.product(x, (0,)).astype(options.dtype)
        else:
            y = checkpoint_name(product(x, kernel.astype(options.dtype), 1), PRODUCT)
        return y if bias is None else y + bias.astype(options.dtype)

    act = ACTIVATIONS[options.activation]
    x = x.astype(options.dtype)
    hidden = dense("up", x)
    hidden = act(dense("gate", x)) * hidden if options.gated_feed_forward else act(hidden)
    return dense("down", hidden)


class ExpertMlp(nn.Module):
    """The parameters of the experts of a pool, those of an `Mlp` each."""

    options: TransformerOptions
    count: int

    @nn.compact
    def __call__(self) -> Weights:
        o = self.options
        wide, narrow = ("embed", o.width), ("feed_forward", o.feed_forward)
        dense = partial(ExpertDense, self.count, o.feed_forward_bias)
        maps = ("gate", "up") if o.gated_feed_forward else ("up",)
        found = {name: dense(wide, narrow, name=name)() for name in maps}
        return {**found, "down": dense(narrow, wide, o.branch_scale, name="down")()}


class ExpertDense(nn.Module):
    """The kernels [E, in, out] and biases of a dense map of each expert.

    Attributes:
      into, out: logical name and size of the axes that go in and come out.
      scale: as in `Dense`.
    """

    count: int
    use_bias: bool
    into: tuple[str, int]
    out: tuple[str, int]
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> tuple[Any, Any]:
        (first, size), (last, features) = self.into, self.out
        start = nn.initializers.variance_scaling(
            self.scale**2, "fan_in", "truncated_normal", in_axis=1, out_axis=2, batch_axis=0
        )
        shape = (self.count, size, features)
        kernel = self.param("kernel", partitioned(start, "experts", first, last), shape)
        if not self.use_bias:
            return kernel, None
        zeros = partitioned(nn.initializers.zeros, "experts", last)
        return kernel, self.param("bias", zeros, (self.count, features))


def statistics(routed: Routed, taken: Bool[Array, "B N E"], bias: Any) -> Float[Array, "B numbers"]:
    """Returns what a pool's tokens add up to, by example: see `RoutingStatistics`."""
    there = routed.valid[..., None]
    p = routed.probabilities
    chosen = taken if routed.order == "choice" else routed.chosen & there
    load = chosen.sum(1).astype(jnp.float32)
    entropy = -jnp.where(there, p * jnp.log(jnp.maximum(p, 1e-30)), 0).sum((1, 2))
    z = jnp.square(jax.nn.logsumexp(routed.logits, axis=-1))
    pull = (
        jnp.zeros(entropy.shape) if bias is None else (load - load.mean(-1, keepdims=True)) @ bias
    )
    single = (
        routed.valid.sum(1).astype(jnp.float32),
        taken.any(-1).sum(1).astype(jnp.float32),
        entropy,
        jnp.where(routed.valid, z, 0).sum(1),
        pull - jax.lax.stop_gradient(pull),
    )
    several = jnp.concatenate([load, jnp.where(there, p, 0).sum(1)], axis=1)
    return jnp.concatenate([jnp.stack(single, axis=1), several], axis=1)


@struct.dataclass
class RoutingStatistics:
    """What the tokens of a group of examples add up to, for each example the same.

    Attributes:
      tokens: how many there are.
      served: how many of them an expert took.
      entropy: of the router's probabilities.
      z: squares of the logarithm of the sum of the exponentials of the logits.
      pull: 0, with the gradient by which a bias balances the loads.
      load: [..., E], choices of each expert.
      probability: [..., E].
    """

    tokens: Any
    served: Any
    entropy: Any
    z: Any
    pull: Any
    load: Any
    probability: Any

    @classmethod
    def unpack(cls, x: Float[Array, "... numbers"]) -> RoutingStatistics:
        """Returns the statistics in an array that a layer sowed."""
        load, probability = jnp.split(x[..., 5:], 2, axis=-1)
        tokens, served, entropy, z, pull = jnp.moveaxis(x[..., :5], -1, 0)
        return cls(tokens, served, entropy, z, pull, load, probability)
