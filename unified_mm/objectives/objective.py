"""The interface of an objective, and the computation of several on one batch."""

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

from unified_mm.config import check_options, read_options
from unified_mm.models.unified import Batch, Encoded, UnifiedModel
from unified_mm.nn.attention.rules import NONE, View, share_readings
from unified_mm.nn.sow import AUXILIARY, auxiliary_by_path
from unified_mm.registry import resolve

BUILT_IN = {
    "classification": "unified_mm.objectives.classification:Classification",
    "contrastive": "unified_mm.objectives.contrastive:Contrastive",
    "captioning": "unified_mm.objectives.captioning:Captioning",
    "matching": "unified_mm.objectives.matching:Matching",
    "exits": "unified_mm.objectives.exits:Exits",
    "routing": "unified_mm.objectives.routing:Routing",
    "neurons": "unified_mm.objectives.neurons:Neurons",
    "transcription": "unified_mm.objectives.transcription:Transcription",
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# A metric as (sum, count), both float32 []: it adds up over devices, micro-batches and batches.
Metric = tuple[Any, Any]


def same_rank(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes it an error within a function to broadcast arrays of different ranks.

    Without it `[B, S] & [B]` broadcasts where S is 1 or B, and training goes on with a wrong loss.
    Scalars still broadcast.
    """

    @functools.wraps(function)
    def strictly(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.numpy_rank_promotion("raise"):
            return function(*args, **kwargs)

    return strictly


@struct.dataclass
class Embedded:
    """The embeddings that an objective compares between examples, which can be cached.

    Attributes:
      vectors: float arrays [B, ...], through which its gradient flows.
      counts: bool [B, M], which examples count, by modality.
      items: int32 arrays [B, ...] by name, which tell examples of one item, or ().
    """

    vectors: Any
    counts: Any
    items: Any = ()


@struct.dataclass
class ObjectiveOutput:
    """The output of an objective on a batch.

    Attributes:
      loss: (sum, count); training minimises the mean.
      metrics: other (sum, count), by name.
      extras: arrays for later objectives (such as the similarities that negatives are mined from).
      embedded: of an objective that compares examples with one another; else None.
    """

    loss: Metric
    metrics: dict[str, Metric]
    extras: dict[str, Any]
    embedded: Embedded | None = None


@struct.dataclass
class StepContext:
    """The inputs of an objective besides its batch and the encodings of it.

    Attributes:
      step: int32 [], how many steps were done before; 0 outside training.
      auxiliary: values that layers sowed in the shared pass, by path, of a stack each
        [periods, groups, ...] (see `nn.sow_auxiliary`); empty where no objective reads them.
      earlier: outputs of the objectives before this one, by name.
      read_as: by view name, that of the first view that is read alike, after which the tokens of
        the shared pass are named.
    """

    step: Any
    auxiliary: dict[str, Any]
    earlier: dict[str, Any]
    read_as: dict[str, str] = struct.field(pytree_node=False, default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """One term of the loss; an immutable value.

    An objective may also have `rngs`, names of the random streams that it draws from
    (`model.make_rng(name)`), `auxiliary`, whether it reads the auxiliary values of layers (it then
    comes after all objectives that do not), and `tells_records`, whether it asks which record each
    example is of: int32 [B], `RECORD` among the arrays of each modality of a training batch. It may
    have `from_data` and `measure` as modalities have, and `of` with `preparer(modality, records)`,
    what prepares the modality `of` in place of itself, with what the objective asks for beside.

    Attributes:
      kind: the ability that it needs of a fusion: 'contrastive', 'captioning', 'matching', or a
        name of your own that your fusion has among its `abilities`; '' needs none.
      name: its key under `config.objectives`.
      weight: of its mean loss in the total.
    """

    kind: ClassVar[str]
    name: str
    weight: float

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Objective:
        """Returns the objective of `config.objectives.<name>`."""

    def needs(self) -> tuple[str, ...]:
        """Returns the names of the objectives that must come earlier."""

    def views(self) -> tuple[View, ...]:
        """Returns the views that it needs from the shared pass over the context."""

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        """Returns which of the context modalities have a part in its loss."""

    def head(self) -> nn.Module | None:
        """Returns the module that it adds to the model as `model.head[name]`, or None."""

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

        Args:
          model: bound to its parameters.
          encoded: outputs of the shared pass, by view name.
          batch: arrays by modality.
          context: the other inputs.
          deterministic: whether there is no dropout.
        """


@runtime_checkable
class CrossExampleLoss(Protocol):
    """An objective whose loss compares all examples of a batch, and is no sum over examples."""

    name: str

    def compare(self, model: UnifiedModel, embedded: Embedded) -> ObjectiveOutput:
        """Returns the loss over all embedded examples, which may be of several micro-batches."""


@dataclass(frozen=True)
class TextObjective:
    """The base of objectives on one text under one attention rule.

    Attributes:
      name: its key under `config.objectives`.
      weight: of its mean loss in the total.
      rule: the attention rule, by name or `package.module:NAME`.
    """

    name: str
    weight: float
    rule: str

    kind: ClassVar[str] = ""
    autoregressive: ClassVar[bool] = False

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> TextObjective:
        """Returns the objective of `config.objectives.<name>`: its fields are its options.

        Raises:
          ValueError: an option is none of its fields, or its value is not allowed.
        """
        given = {"weight": 1.0, "rule": "separate", **options}
        own = {key: given[key] for key in given if key not in ("type", "weight_schedule")}
        where = f"objectives.{name}"
        built = cls(name=name, **read_options(cls, own, where))
        check_options(built, where)
        return built

    @functools.cached_property
    def view(self) -> View:
        return View(self.name, self.rule, self.autoregressive)

    def needs(self) -> tuple[str, ...]:
        return ()

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        rule = self.view.resolved
        return tuple(name for name in contexts if rule.to_context(name) != NONE)

    def head(self) -> nn.Module | None:
        return None


def objective_kind(name: str) -> str:
    """Returns the kind of the objectives of a type, by the name of the type."""
    kind: str = resolve("objective", name, BUILT_IN).kind
    return kind


def build_objectives(options: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """Returns the objectives of a config with a weight above zero, each after those it needs.

    Raises:
      ValueError: a type is unknown, a weight is negative, there is no objective, or one needs
        another that has no weight above zero.
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
    # Stable: those that read auxiliary values come last.
    return tuple(sorted(found, key=lambda each: getattr(each, "auxiliary", False)))


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
    """Returns for each objective whose weight changes its factor as a function of the step.

    Args:
      options: `config.objectives`.
      objectives: those with a weight above zero.
      steps: of the run.

    Raises:
      ValueError: a schedule is unknown.
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


def weighted(
    objectives: Sequence[Any], weights: Mapping[str, float], where: str
) -> tuple[Any, ...]:
    """Returns the objectives with other weights, without those whose weight is 0.

    Args:
      objectives: of the task.
      weights: by name; an objective without an entry has its own weight.
      where: the group of the config, for messages.

    Raises:
      ValueError: a weight is of an unknown objective, no objective is left, or one that is left
        needs another that is not.
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
    """Checks that there are objectives, and that those that they need are among them.

    Raises:
      ValueError: this is not so; the message names `where`.
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
    """Returns the output of every objective on one batch, by name.

    The context is encoded once for all objectives that can share it, and a text once for all that
    read it in the same way.
    """
    views = [view for objective in objectives for view in objective.views()]
    read_as = share_readings(views, model.context_names)
    read = list(dict.fromkeys(read_as.values()))
    once = model.encode(batch, read, deterministic=deterministic) if read else {}
    encoded = {name: once[view.name] for name, view in read_as.items()}
    names = {name: view.name for name, view in read_as.items()}
    left = auxiliary_by_path(model.variables[AUXILIARY]) if AUXILIARY in model.variables else {}
    outcomes: dict[str, ObjectiveOutput] = {}
    for objective in objectives:
        context = StepContext(step, left, dict(outcomes), names)
        outcomes[objective.name] = objective(
            model, encoded, batch, context, deterministic=deterministic
        )
    return outcomes


def compare_embedded(
    model: UnifiedModel, embedded: Mapping[str, Embedded], objectives: Sequence[Any]
) -> dict[str, ObjectiveOutput]:
    """Returns the outputs of objectives that compare examples, on cached embeddings, by name."""
    comparing = {each.name: each for each in objectives if isinstance(each, CrossExampleLoss)}
    return {name: comparing[name].compare(model, kept) for name, kept in embedded.items()}


def as_metrics(outcomes: Mapping[str, ObjectiveOutput]) -> dict[str, Metric]:
    """Returns losses and metrics by name: `contrastive/loss`, `contrastive/accuracy`, ..."""
    return {
        f"{name}/{key}": metric
        for name, outcome in outcomes.items()
        for key, metric in {"loss": outcome.loss, **outcome.metrics}.items()
    }


@same_rank
def text_valid(text: Mapping[str, Array]) -> Bool[Array, "B T"]:
    """Returns which text tokens are valid, in the examples that have text."""
    return text["valid"] & text["present"][:, None]


def masked_metric(values: Float[Array, "..."], where: Bool[Array, "..."]) -> Metric:
    """Returns the sum of `values` where `where` is true, and the number of these.

    Raises:
      ValueError: the shapes differ; `jnp.where` would broadcast them silently.
    """
    if values.shape != where.shape:
        raise ValueError(f"values of {values.shape} cannot be counted by {where.shape}")
    return (
        jnp.where(where, values, 0.0).sum(dtype=jnp.float32),
        where.sum(dtype=jnp.float32),
    )


def mean(metric: Metric) -> Any:
    """Returns the mean; with a count of 0 it is 0, so that nothing is added to the loss."""
    return metric[0] / jnp.maximum(metric[1], 1.0)
