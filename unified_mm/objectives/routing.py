"""Auxiliary losses of experts' routers, so that all experts are used and none too often."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from unified_mm.config import option
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.experts import ROUTING, RoutingStatistics
from unified_mm.objectives.auxiliary import Auxiliary
from unified_mm.objectives.objective import (
    Embedded,
    Metric,
    ObjectiveOutput,
    StepContext,
    masked_metric,
)


@dataclass(frozen=True)
class Routing(Auxiliary):
    """A weighted sum of losses on what routers do with the tokens of a batch.

    Each is a mean over layers, pools and groups of examples. The entropies are of all tokens of a
    modality in the batch, over devices and micro-batches (examples that are alike within and differ
    from each other use all experts together, but few apart), and count in each group that has such
    tokens; micro-batches are read once more for them. To balance loads by a bias is an option of
    the experts; its gradient comes with this objective.

    Attributes:
      weight: of the sum in the total.
      balance: of E sum_e f_e P_e, with the share f of choices and the mean probability P (Fedus et
        al. 2022, Switch, equation 4); 1 where all experts are used alike.
      z: of the mean squared logarithm of the logits' partition function (Zoph et al. 2022, ST-MoE,
        equation 5).
      importance: of the squared coefficient of variation of P (Shazeer et al. 2017, equation 7).
      local_entropy: of the mean over tokens of the entropy of p, for the modalities `local_of`
        (Mustafa et al. 2022, LIMoE, section 2.2).
      global_entropy: of what the entropy of the mean over tokens of p, of each modality, lacks of
        that of `least_share` of the experts used alike (there too).
      local_of, least_share: as said.
    """

    balance: float = option(0.01, least=0)
    z: float = option(0.001, least=0)
    importance: float = option(0.0, least=0)
    local_entropy: float = option(0.0, least=0)
    global_entropy: float = option(0.0, least=0)
    local_of: tuple = ("text",)
    least_share: float = option(0.5, above=0, most=1)

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        """Returns the loss.

        Raises:
          ValueError: no layer has experts.
        """
        if model.is_initializing():  # layers leave nothing
            return ObjectiveOutput((jnp.zeros(()), jnp.zeros(())), {}, {})
        # Groups come first: along them micro-batches are joined.
        left = {
            path: x.swapaxes(0, 1)
            for path, x in context.auxiliary.items()
            if f"/{ROUTING}:" in path
        }
        if not left:
            raise ValueError(
                f"objectives.{self.name}: no layer has experts; set "
                "model.feed_forward_type='experts', or the weight to 0"
            )
        return self.compare(model, Embedded(left, ()))

    def compare(self, model: UnifiedModel, embedded: Embedded) -> ObjectiveOutput:
        """Returns the loss on what layers left of all examples, [groups, periods, ...] by path."""
        pools, by_modality = sown(embedded.vectors)
        loss = added((self.of_pool(each), each) for each in pools)
        metrics: dict[str, Metric] = {"balance": added((balance(each), each) for each in pools)}
        for modality, several in by_modality.items():
            # It counts no more groups: the mean is of pools, with what their modalities add.
            more = added((self.of_modality(modality, each), each) for each in several)
            loss = loss[0] + more[0], loss[1]
            tokens = sum(each.tokens.sum() for each in several)
            served = sum(each.served.sum() for each in several)
            metrics[f"dropped_{modality}"] = (tokens - served, tokens)
            used = [(alike(jnp.exp(entropy(each.load.sum(0))), each), each) for each in several]
            metrics[f"experts_{modality}"] = added(used)
        return ObjectiveOutput(loss, metrics, {}, embedded)

    def of_pool(self, pool: RoutingStatistics) -> Float[Array, "groups periods"]:
        """Returns the loss of each group of examples on the tokens of a pool."""
        tokens, share = jnp.maximum(pool.tokens, 1), shares(pool.probability)
        loss = self.balance * balance(pool) + self.z * pool.z / tokens + pool.pull / tokens
        experts = share.shape[-1]
        return loss + self.importance * (experts * jnp.square(share).sum(-1) - 1)

    def of_modality(self, modality: str, some: RoutingStatistics) -> Float[Array, "groups periods"]:
        """Returns the loss on the batch's tokens of a modality, for each group the same."""
        wanted = math.log(max(1.0, self.least_share * some.probability.shape[-1]))
        lacking = jnp.maximum(wanted - entropy(some.probability.sum(0)), 0)
        loss = self.global_entropy * lacking
        if modality in self.local_of:
            loss += self.local_entropy * some.entropy.sum(0) / jnp.maximum(some.tokens.sum(0), 1)
        return alike(loss, some)


def sown(
    left: Mapping[str, Any],
) -> tuple[list[RoutingStatistics], dict[str, list[RoutingStatistics]]]:
    """Returns what layers with experts sowed: of each pool, and of its tokens by modality."""
    found: dict[str, list[RoutingStatistics]] = {}
    for path, x in left.items():
        found.setdefault(path.rpartition(":")[2], []).append(RoutingStatistics.unpack(x))
    return found.pop(""), found


def alike(x: Float[Array, " periods"], of: RoutingStatistics) -> Float[Array, "groups periods"]:
    """Returns what each layer has of the whole batch, for each group of examples."""
    return jnp.broadcast_to(x, of.tokens.shape)


def added(terms: Iterable[tuple[Array, RoutingStatistics]]) -> Metric:
    """Returns the sum and number of values of groups, of those that have tokens."""
    metrics = [masked_metric(values, of.tokens > 0) for values, of in terms]
    return sum(metric[0] for metric in metrics), sum(metric[1] for metric in metrics)


def shares(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Returns what adds up to 1 in proportion to x, zeros where all is 0."""
    total = x.sum(-1, keepdims=True)
    return x / jnp.where(total > 0, total, 1)


def balance(pool: RoutingStatistics) -> Float[Array, "groups periods"]:
    """Returns E sum_e f_e P_e, 1 where all experts are used alike."""
    return pool.load.shape[-1] * (shares(pool.load) * shares(pool.probability)).sum(-1)


def entropy(x: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Returns the entropy of the shares of x, in nats."""
    share = shares(x)
    return -(share * jnp.log(jnp.maximum(share, 1e-30))).sum(-1)
