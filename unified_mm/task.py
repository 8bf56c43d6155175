"""A task: the modalities, model and objectives that a config asks for, as one value."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unified_mm.config import Config
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.modalities.modality import build_modalities
from unified_mm.modalities.text import TextModality
from unified_mm.models.reader import Reader
from unified_mm.models.unified import ABLE, UnifiedModel, fusion
from unified_mm.nn.sow import AUXILIARY, auxiliary_by_path
from unified_mm.objectives.captioning import Captioning
from unified_mm.objectives.contrastive import Contrastive, Foiled
from unified_mm.objectives.exits import Exits
from unified_mm.objectives.neurons import Neurons
from unified_mm.objectives.objective import (
    Embedded,
    Metric,
    all_losses,
    as_metrics,
    build_objectives,
    compare_embedded,
    weight_schedules,
)
from unified_mm.objectives.routing import Routing
from unified_mm.objectives.transcription import Transcription
from unified_mm.parallel.sharding import path_of


@dataclass(frozen=True)
class Resources:
    """The inputs that modalities share.

    Attributes:
      data: `config.data`.
      tokenizer: of the run.
      reader: the text modality of `model.reader`; None without one.
    """

    data: Config
    tokenizer: TextTokenizer
    reader: TextModality | None = None


@dataclass(frozen=True)
class Task:
    """The static parts of a training: modalities, model and objectives.

    Attributes:
      modalities: by name, in sequence order, text last.
      model: without parameters.
      objectives: those with a weight above zero, each after those it needs.
      tokenizer: of the run.
      weight_schedules: step -> factor of the weight, by objective whose weight changes.
    """

    modalities: Mapping[str, Any]
    model: UnifiedModel
    objectives: tuple[Any, ...]
    tokenizer: TextTokenizer
    weight_schedules: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def preparers(self, records: Sequence[Any] = ()) -> dict[str, Any]:
        """Returns what turns an example into arrays for training, by modality.

        Args:
          records: those that are trained on, of which an objective may mix some.

        Raises:
          ValueError: two objectives ask for one modality.
        """
        found = dict(self.modalities)
        if self.foiled:
            found["text"] = Foiled(found["text"])
        plain = dict(found)
        for each in self.objectives:
            if hasattr(each, "preparer"):
                if found[each.of] is not plain[each.of]:
                    raise ValueError(
                        f"objectives.{each.name} and another one both classify or transcribe "
                        f"{each.of}: one may"
                    )
                found[each.of] = each.preparer(plain[each.of], records)
        return found

    def example_batch(self, size: int, training: bool = True) -> dict[str, dict[str, np.ndarray]]:
        """Returns a batch [size, ...] of absent examples, with the right keys, shapes and types.

        Args:
          size: of the batch.
          training: whether it has what objectives ask for beside.
        """
        preparers = self.preparers() if training else self.modalities
        return {
            name: {key: np.stack([value] * size) for key, value in preparer.absent().items()}
            for name, preparer in preparers.items()
        }

    def init(self, key: jax.Array) -> Any:
        """Returns initial parameters, boxed with their logical axis names."""
        batch = jax.tree.map(jnp.asarray, self.example_batch(2))
        params, dropout, drawn = jax.random.split(key, 3)
        rngs = {"params": params, "dropout": dropout, **self._rngs(drawn)}
        # Parameters do not depend on how attention is computed, and two examples suit no kernel.
        model = self.model.with_options(attention="xla")
        with nn.logical_axis_rules(()):  # a mesh may not divide the two examples
            variables = model.init(
                rngs, batch, self.objectives, 0, deterministic=True, method=all_losses
            )
        return variables["params"]

    def abstract_params(self) -> Any:
        """Returns the shapes of the parameters, boxed in the same way; nothing is allocated."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def metrics(
        self, params: Any, batch: Any, key: jax.Array, *, deterministic: bool, step: Any = 0
    ) -> dict[str, Metric]:
        """Returns every objective's loss and metrics on a batch, as (sum, count) by name."""
        return self.metrics_and_embedded(
            params, batch, key, deterministic=deterministic, step=step
        )[0]

    def metrics_and_embedded(
        self, params: Any, batch: Any, key: jax.Array, *, deterministic: bool, step: Any = 0
    ) -> tuple[dict[str, Metric], dict[str, Embedded]]:
        """Returns `metrics`, and the embeddings of objectives that compare examples, by name."""
        # Layers sow auxiliary values only where an objective reads them.
        leave = any(getattr(each, "auxiliary", False) for each in self.objectives)
        outcomes, _ = self._losses(params, batch, key, deterministic, step, leave)
        one = jnp.ones((), jnp.float32)
        param_metrics = self.model.param_metrics(params)
        metrics = as_metrics(outcomes) | {
            name: (value, one) for name, value in param_metrics.items()
        }
        embedded = {name: each.embedded for name, each in outcomes.items() if each.embedded}
        return metrics, embedded

    def auxiliary(
        self, params: Any, batch: Any, key: jax.Array, *, deterministic: bool
    ) -> dict[str, jax.Array]:
        """Returns the auxiliary values of layers, by path; of a stack, [periods, groups, ...]."""
        _, left = self._losses(params, batch, key, deterministic, 0, True)
        return auxiliary_by_path(left.get(AUXILIARY, {}))

    def weight_factors(self, step: Any) -> dict[str, Any]:
        """Returns the factors of the weights at a step, by objective whose weight changes."""
        return {name: schedule(step) for name, schedule in self.weight_schedules.items()}

    def _losses(
        self, params: Any, batch: Any, key: jax.Array, deterministic: bool, step: Any, leave: bool
    ) -> tuple[Any, Any]:
        """Returns the output of every objective, and the collections that layers sowed into."""
        dropout, drawn = jax.random.split(key)
        found: Any = self.model.apply(
            {"params": params},
            batch,
            self.objectives,
            step,
            deterministic=deterministic,
            method=all_losses,
            rngs={"dropout": dropout, **self._rngs(drawn)},
            mutable=[AUXILIARY] if leave else False,
        )
        return found if leave else (found, {})

    def _rngs(self, key: jax.Array) -> dict[str, jax.Array]:
        """Returns a key for each random stream of the objectives.

        That of 'mining' is `key` itself, as it was when there was no other stream.
        """
        names = [name for each in self.objectives for name in getattr(each, "rngs", ())]
        return {
            name: key if name == "mining" else jax.random.fold_in(key, zlib.crc32(name.encode()))
            for name in names
        }

    def contrasts(self, *between: str) -> list[Contrastive]:
        """Returns the contrastive objectives that compare all these modalities."""
        found = [each for each in self.objectives if isinstance(each, Contrastive)]
        return [each for each in found if set(between) <= set(each.between)]

    @property
    def foiled(self) -> list[Contrastive]:
        """The contrastive objectives that hold each context against a foil too."""
        return [each for each in self.contrasts() if each.foils]

    def embed(self, params: Any, batch: Any, of: str, objective: str = "") -> jax.Array:
        """Returns unit vectors [B, Z] of one modality of a batch, alone or beside other context.

        Args:
          params: the parameters.
          batch: the context, or `text` for texts.
          of: the modality.
          objective: the contrastive objective in whose space they lie, where several embed the
            modality.

        Raises:
          ValueError: no contrastive objective embeds it, or several do and none is named.
        """
        chosen = self.embedding(of, objective)

        def embed(model: UnifiedModel, batch: Any) -> jax.Array:
            return chosen.embed(model, batch, of)

        vectors: Any = self.model.apply({"params": params}, batch, method=embed)
        return vectors

    def embedding(self, of: str, objective: str = "") -> Contrastive:
        """Returns the contrastive objective that embeds a modality.

        Args:
          of: the modality.
          objective: its name, where several embed the modality.

        Raises:
          ValueError: as `embed` does.
        """
        if of not in self.modalities:
            there = ", ".join(self.modalities)
            raise ValueError(f"this model reads no {of}: what it reads is {there}")
        able = [each for each in self.contrasts(of) if objective in ("", each.name)]
        if len(able) == 1:
            return able[0]
        if able:
            raise ValueError(
                f"{of} is embedded by several objectives, {_said(able)}: name one of them"
            )
        trained = _said(self.contrasts()) or ", ".join(each.name for each in self.objectives)
        asked = f"objective={objective!r} embeds no {of}" if objective else f"nothing embeds {of}"
        raise ValueError(f"{asked}: the model was trained on {trained}")

    def shared_space(self, *modalities: str) -> str:
        """Returns the contrastive objective that compares these modalities, by its name.

        It is '' where there is none, or more than one.
        """
        found = self.contrasts(*modalities)
        return found[0].name if len(found) == 1 else ""

    def space_of(self, of: str, objective: str = "") -> Contrastive:
        """Returns the contrastive objective in whose space a modality's items are looked for.

        It is the one that is named, else the only one with texts, else as in `embedding`.

        Raises:
          ValueError: as `embedding` does.
        """
        return self.embedding(of, objective or self.shared_space(of, "text"))

    def compared(self, params: Any, embedded: Mapping[str, Embedded]) -> dict[str, Metric]:
        """Returns loss and metrics of the objectives that compare examples, over all embedded."""
        outcomes: Any = self.model.apply(
            {"params": params}, embedded, self.objectives, method=compare_embedded
        )
        return as_metrics(outcomes)


def _said(contrasts: Sequence[Contrastive]) -> str:
    return ", ".join(f"{each.name} ({', '.join(each.between)})" for each in contrasts)


def build_task(config: Config, tokenizer: TextTokenizer) -> Task:
    """Returns the task of a config.

    Raises:
      ValueError: a fusion, modality or objective is unknown or cannot do what is asked.
    """
    m = config.model
    kind = fusion(m.fusion)
    reader = reading_modality(config, tokenizer)
    modalities = build_modalities(m.modalities, Resources(config.data, tokenizer, reader))
    objectives = build_objectives(config.objectives)
    check_abilities(m.fusion, kind, objectives)
    if tokenizer.image_id is not None and not kind.places_pictures:
        raise ValueError(
            f"data.special_tokens.image={tokenizer.special_tokens['image']!r}: model.fusion="
            f"{m.fusion!r} reads no picture within a text; set it to '', or the fusion to "
            "'early_features'"
        )
    if m.dropping.keep < 1 and not kind.drops_context:
        raise ValueError(
            f"model.dropping.keep={m.dropping.keep}: only the early fusions drop tokens of the "
            f"context, and not model.fusion={m.fusion!r}: set it to 1, or the fusion to 'early'"
        )
    if m.dropping.keep < 1:
        check_dropping(objectives)
    check_modalities(modalities, objectives)
    check_exits(m.exits, objectives)
    check_reader(reader, objectives)
    heads = {objective.name: objective.head() for objective in objectives}
    if reader is not None:
        heads["reader"] = Reader.from_config(m.reader, reader)
    model = kind.from_config(
        m, modalities, {name: head for name, head in heads.items() if head is not None}
    )
    check_neurons(model, objectives)
    schedules = weight_schedules(config.objectives, objectives, config.train.steps)
    return Task(modalities, model, objectives, tokenizer, schedules)


def load_tokenizer(path: Path, config: Config) -> TextTokenizer:
    """Reads the tokenizer of a run, with that of its reader, if it has one.

    Raises:
      FileNotFoundError, ValueError: as `TextTokenizer.load` does.
    """
    beside = config.model.reader["special_tokens"] if config.model.reader else None
    return TextTokenizer.load(path, beside, **config.data.special_tokens)


def reading_modality(config: Config, tokenizer: TextTokenizer) -> TextModality | None:
    """Returns what prepares texts for `model.reader`; None where there is none.

    Raises:
      ValueError: the tokenizer comes without the reader's.
    """
    if not config.model.reader:
        return None
    if tokenizer.reader is None:
        raise ValueError("model.reader reads other tokens: the tokenizer has no `reader` for them")
    resources = Resources(config.data, tokenizer.reader)
    return TextModality.from_config("text", config.model.reader["text"], resources)


def check_reader(reader: Any, objectives: Sequence[Any]) -> None:
    """Checks that a contrast reads its texts by a reader where there is one, and else none does.

    Raises:
      ValueError: this is not so.
    """
    if reader is not None and any(each.name == "reader" for each in objectives):
        raise ValueError("objectives.reader: beside a reader it needs another name")
    reading = [each.name for each in objectives if getattr(each, "reader", False)]
    if reading and reader is None:
        raise ValueError(
            f"objectives.{reading[0]}.reader=True, but there is none: name the run of a text model "
            "in model.start_from.reader, or set it to False"
        )
    if reader is not None and not reading:
        raise ValueError(
            "model.start_from.reader names a run, but no objective reads by it: set "
            "objectives.contrastive.reader=True and its weight above 0, or name none"
        )


def check_abilities(name: str, kind: type[UnifiedModel], objectives: Sequence[Any]) -> None:
    """Checks that the fusion can serve every objective.

    Raises:
      ValueError: it cannot; the message has the table of what each fusion can serve.
    """
    for objective in objectives:
        if objective.kind and objective.kind not in kind.abilities:
            raise ValueError(
                f"model.fusion={name!r} cannot serve objectives.{objective.name} "
                f"({objective.kind}); set objectives.{objective.name}.weight=0 or another fusion:\n"
                f"{ABLE}"
            )


def check_modalities(modalities: Mapping[str, Any], objectives: Sequence[Any]) -> None:
    """Checks that each context modality has a part in some loss, and that those read exist.

    Raises:
      ValueError: this is not so; the message names the modality.
    """
    contexts = [name for name in modalities if name != "text"]
    for objective in objectives:
        for name in objective.reads(contexts):
            if name not in contexts:
                raise ValueError(
                    f"objectives.{objective.name} reads modality {name!r}; model.modalities "
                    f"declares {', '.join(modalities)}"
                )
    read = {name for objective in objectives for name in objective.reads(contexts)}
    unread = [name for name in contexts if name not in read]
    if unread:
        raise ValueError(
            f"model.modalities.{unread[0]} is declared, but no objective with a weight above 0 "
            "reads it under its rule"
        )


def check_dropping(objectives: Sequence[Any]) -> None:
    """Checks that no objective needs the tokens of a context at their places.

    Raises:
      ValueError: one does.
    """
    for each in objectives:
        where = f"objectives.{each.name}"
        if isinstance(each, Transcription):
            why = f"{where} writes what each moment says: set its weight to 0"
        elif getattr(each, "pool", "") in ("first", "first_two", "last"):
            why = f"{where}.pool={each.pool!r} may be dropped: set it to 'mean'"
        else:
            continue
        raise ValueError(f"model.dropping.keep is below 1, and {why}, or keep to 1")


def check_exits(exits: Sequence[int], objectives: Sequence[Any]) -> None:
    """Checks that exits have an objective that trains them, and it exits and texts to write.

    Raises:
      ValueError: one is there without the other.
    """
    written = [each.name for each in objectives if isinstance(each, Captioning)]
    for each in objectives:
        if isinstance(each, Exits) and each.of not in written:
            raise ValueError(
                f"objectives.{each.name}.of={each.of!r}: no objective of this name learns to "
                f"write; there are {', '.join(written) or 'none'} that do"
            )
    names = [each.name for each in objectives if isinstance(each, Exits)]
    if names and not exits:
        raise ValueError(
            f"model.exits=(): objectives.{names[0]} has a weight above 0; name layers after which "
            "one may leave, such as (4,), or set it to 0"
        )
    if exits and not names:
        raise ValueError(
            f"model.exits={tuple(exits)}: no objective trains them; set objectives.exits.weight=1"
        )


def check_neurons(model: UnifiedModel, objectives: Sequence[Any]) -> None:
    """Checks that what names neurons has an objective that trains it, and it such layers.

    Raises:
      ValueError: one is there without the other.
    """
    few = any(each.feed_forward_type == "neurons" for each in model.stacks.values())
    names = [each.name for each in objectives if isinstance(each, Neurons)]
    if names and not few:
        raise ValueError(
            f"objectives.{names[0]}: no layer uses few neurons; set "
            "model.feed_forward_type='neurons', or the weight to 0"
        )
    if few and not names:
        raise ValueError(
            "model.feed_forward_type='neurons': no objective trains what names the neurons; set "
            "objectives.neurons.weight=1"
        )


def check_bias(model: UnifiedModel, objectives: Sequence[Any]) -> None:
    """Checks that a bias that balances experts' loads has an objective that trains it.

    Raises:
      ValueError: it has none.
    """
    biased = any(each.own("bias_balance", False) for each in model.stacks.values())
    if biased and not any(isinstance(each, Routing) for each in objectives):
        raise ValueError(
            "model.feed_forward_options.bias_balance=True: no objective moves the bias; set "
            "objectives.routing.weight=1, or it to False"
        )


def parameter_counts(params: Any) -> dict[str, int]:
    """Returns the number of parameters of each part of the model."""
    counts: dict[str, int] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        part = path_of(key_path).split("/")[0]
        counts[part] = counts.get(part, 0) + int(np.prod(leaf.shape))
    return counts
