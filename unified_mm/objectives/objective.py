"""What an objective is, and how several add up to one loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from unified_mm.config import read_options
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import NONE, View, share_readings
from unified_mm.nn.sow import AUXILIARY, auxiliary_by_path
from unified_mm.registry import resolve

BUILT_IN = {
    "contrastive": "unified_mm.objectives.contrastive:Contrastive",
    "captioning": "unified_mm.objectives.captioning:Captioning",
    "matching": "unified_mm.objectives.matching:Matching",
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# A metric as (sum, count), both float32 []: it adds up over devices, micro-batches and batches.
Metric = tuple[Any, Any]


def same_rank(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes joining arrays of different ranks an error within a function.

    Without it `[B, S] & [B]` broadcasts where S is 1 or B, and a loss of nonsense trains on.
    Scalars join anything.
    """

    @functools.wraps(function)
    def strictly(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_rank_promotion("raise"):
            return function(*args, **kwargs)

    return strictly


@struct.dataclass
class Embedded:
    """What an objective compares between examples, so that it can be cached and compared again.

    Attributes:
      vectors: float arrays [B, ...], through which its gradient goes.
      counts: bool [B, M], which examples have a part by each modality.
    """

    vectors: Any
    counts: Any


@struct.dataclass
class ObjectiveOutput:
    """What an objective makes of a batch.

    Attributes:
      loss: (sum, count); the mean is what training minimises.
      metrics: further pairs, by name.
      extras: arrays for the objectives that come later (the similarities that negatives are mined
        from).
      embedded: of an objective that compares examples with one another; else None.
    """

    loss: Metric
    metrics: dict[str, Metric]
    extras: dict[str, Any]
    embedded: Embedded | None = None


@struct.dataclass
class StepContext:
    """What an objective may go by, beside the encodings of its batch.

    Attributes:
      step: int32 [], how many steps were done before; 0 outside training.
      auxiliary: what layers left in the shared pass, by their paths, each [L, groups, ...] (see
        `nn.sow_auxiliary`); empty where no objective asks.
      earlier: what the objectives before this one made of the batch, by name.
    """

    step: Any
    auxiliary: dict[str, Any]
    earlier: dict[str, Any]


@runtime_checkable
class Objective(Protocol):
    """One thing that is scored; an immutable value.

    Attributes:
      kind: what a fusion must be able to serve: 'contrastive', 'captioning', 'matching', or a name
        of your own where your fusion knows it.
      name: its key under `config.objectives`.
      weight: of its mean loss in the total.

    An objective may also say:
      rngs: names of the streams of random numbers that it draws from (`model.make_rng(name)`).
      auxiliary: that it reads what layers leave; then it comes after all that is no such.
    """

    kind: ClassVar[str]
    name: str
    weight: float

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Objective:
        """Built from `config.objectives.<name>`."""

    def needs(self) -> tuple[str, ...]:
        """Names of the objectives that must come earlier."""

    def views(self) -> tuple[View, ...]:
        """The texts it wants read in the shared pass over the context."""

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        """Which of the context modalities have a part in its loss."""

    def head(self) -> nn.Module | None:
        """The parameters it adds to the model, found there as `model.head[name]`."""

    def __call__(
        self,
        model: UnifiedModel,
        encoded: Mapping[str, Encoded],
        batch: Batch,
        context: StepContext,
        *,
        deterministic: bool,
    ) -> ObjectiveOutput:
        """Returns the loss, from the model bound to its parameters and the pass that it shared."""


@runtime_checkable
class CrossExampleLoss(Protocol):
    """An objective whose loss is among all examples of a batch, and no sum over each of them."""

    name: str

    def compare(self, model: UnifiedModel, embedded: Embedded) -> ObjectiveOutput:
        """The loss among all that is embedded, which may come from several micro-batches."""


@dataclass(frozen=True)
class TextObjective:
    """What objectives have in common that score one text read under one rule."""

    name: str
    weight: float
    rule: str

    kind: ClassVar[str] = ""
    autoregressive: ClassVar[bool] = False

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> TextObjective:
        """Returns the objective of `config.objectives.<name>`: its fields are its options.

        Raises:
          ValueError: an option that it has not, or of another type.
        """
        given = {"weight": 1.0, "rule": "separate", **options}
        own = {key: given[key] for key in given if key not in ("type", "weight_schedule")}
        return cls(name=name, **read_options(cls, own, f"objectives.{name}"))

    @property
    def view(self) -> View:
        return View(self.name, self.rule, self.autoregressive)

    def needs(self) -> tuple[str, ...]:
        return ()

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        rule = self.view.resolved()
        return tuple(name for name in contexts if rule.to_context(name) != NONE)

    def head(self) -> nn.Module | None:
        return None


def objective_kind(name: str) -> str:
    """The kind of the objective that a config calls `name`."""
    kind: str = resolve("objective", name, BUILT_IN).kind
    return kind


def build_objectives(options: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """The objectives of a config whose weight is above zero, each after those it needs.

    Raises:
      ValueError: an unknown type, none at all, or one that needs another which is switched off.
    """
    for name, entry in options.items():
        if not entry["weight"] >= 0:
            raise ValueError(f"objectives.{name}.weight={entry['weight']}: must be at least 0")
    built = {
        name: resolve("objective", entry["type"], BUILT_IN).from_config(name, entry)
        for name, entry in options.items()
        if entry["weight"] > 0
    }
    check_needs(tuple(built.values()), "objectives")
    order = TopologicalSorter({name: each.needs() for name, each in built.items()})
    found = [built[name] for name in order.static_order()]
    return tuple(sorted(found, key=reads_auxiliary))  # stable: these come last


# How a weight changes over a run of so many steps: the factor of a step, in [0, 1].
WEIGHT_SCHEDULES: dict[str, Callable[[Any, int], Any]] = {
    "rising": lambda step, steps: jnp.clip(step / steps, 0.0, 1.0),
    "falling": lambda step, steps: 1.0 - jnp.clip(step / steps, 0.0, 1.0),
    "rising_by_half": lambda step, steps: jnp.clip(2.0 * step / steps, 0.0, 1.0),
    "falling_from_half": lambda step, steps: jnp.clip(2.0 - 2.0 * step / steps, 0.0, 1.0),
}


def weight_schedules(
    options: Mapping[str, Mapping[str, Any]], objectives: Sequence[Any], steps: int
) -> dict[str, Callable[[Any], Any]]:
    """Returns by what the weight of each objective whose weight changes is multiplied, by step.

    Args:
      options: `config.objectives`.
      objectives: those that count.
      steps: of the run.

    Raises:
      ValueError: an unknown schedule.
    """
    names = {each.name: options[each.name].get("weight_schedule", "") for each in objectives}
    found = {
        name: resolve("weight schedule", schedule, WEIGHT_SCHEDULES)
        for name, schedule in names.items()
        if schedule
    }

    def factor(schedule: Callable[[Any, int], Any], step: Any) -> Any:
        return schedule(jnp.asarray(step, jnp.float32), steps)

    return {name: functools.partial(factor, each) for name, each in found.items()}


def reads_auxiliary(objective: Any) -> bool:
    """Returns whether an objective reads what layers leave."""
    return bool(getattr(objective, "auxiliary", False))


def rngs_of(objectives: Sequence[Any]) -> tuple[str, ...]:
    """Returns the streams of random numbers that objectives draw from."""
    names = (name for each in objectives for name in getattr(each, "rngs", ()))
    return tuple(dict.fromkeys(names))


def weighted(
    objectives: Sequence[Any], weights: Mapping[str, float], where: str
) -> tuple[Any, ...]:
    """Those of the objectives that count under other weights; without any, all as they are.

    Raises:
      ValueError: naming `where`, for a weight of an objective that there is not, or none left.
    """
    names = [objective.name for objective in objectives]
    for name in weights:
        if name not in names:
            raise ValueError(
                f"{where}.objectives.{name}: no objectives.{name} has a weight above 0; there are "
                f"{', '.join(names)}"
            )
    chosen = [replace(each, weight=weights.get(each.name, each.weight)) for each in objectives]
    kept = tuple(objective for objective in chosen if objective.weight > 0)
    check_needs(kept, where)
    return kept


def check_needs(objectives: Sequence[Any], where: str) -> None:
    """There are objectives, and each has those that it needs.

    Raises:
      ValueError: naming `where`.
    """
    if not objectives:
        raise ValueError(f"{where}: no objective has a weight above 0")
    names = {objective.name for objective in objectives}
    for objective in objectives:
        for other in objective.needs():
            if other not in names:
                raise ValueError(f"{where}: {objective.name} needs {other}.weight above 0")


def all_losses(
    model: UnifiedModel,
    batch: Batch,
    objectives: Sequence[Objective],
    step: Any,
    *,
    deterministic: bool,
) -> dict[str, ObjectiveOutput]:
    """Every objective on one batch.

    The context is encoded once for all that can share it, and a text is read once for all that
    read it alike.
    """
    views = [view for objective in objectives for view in objective.views()]
    read_as = share_readings(views, model.context_names)
    read = list(dict.fromkeys(read_as.values()))
    once = model.encode(batch, read, deterministic=deterministic) if read else {}
    encoded = {name: once[view.name] for name, view in read_as.items()}
    left = auxiliary_by_path(model.variables.get(AUXILIARY, {}))
    outcomes: dict[str, ObjectiveOutput] = {}
    for objective in objectives:
        context = StepContext(step, left, dict(outcomes))
        outcomes[objective.name] = objective(
            model, encoded, batch, context, deterministic=deterministic
        )
    return outcomes


def compare_embedded(
    model: UnifiedModel, embedded: Mapping[str, Embedded], objectives: Sequence[Any]
) -> dict[str, ObjectiveOutput]:
    """The objectives that compare examples, on what of these was embedded before."""
    comparing = {each.name: each for each in objectives if isinstance(each, CrossExampleLoss)}
    return {name: comparing[name].compare(model, kept) for name, kept in embedded.items()}


def as_metrics(outcomes: Mapping[str, ObjectiveOutput]) -> dict[str, Metric]:
    """Losses and metrics by name: `contrastive/loss`, `contrastive/accuracy`, ..."""
    metrics = {}
    for name, outcome in outcomes.items():
        metrics[f"{name}/loss"] = outcome.loss
        for key, metric in outcome.metrics.items():
            metrics[f"{name}/{key}"] = metric
    return metrics


def masked_metric(values: Float[Array, "..."], where: Bool[Array, "..."]) -> Metric:
    """Returns the sum of `values` where they count, and how many those are.

    Raises:
      ValueError: arrays of different shapes, which `jnp.where` would broadcast in silence.
    """
    if values.shape != where.shape:
        raise ValueError(f"values of {values.shape} cannot be counted by {where.shape}")
    return (
        jnp.where(where, values, 0.0).sum(dtype=jnp.float32),
        where.sum(dtype=jnp.float32),
    )


def mean(metric: Metric) -> Any:
    """Of nothing it is 0, so an objective that a batch does not feed adds nothing."""
    return metric[0] / jnp.maximum(metric[1], 1.0)
