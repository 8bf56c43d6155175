"""Phases of training: what is learned, on what, and by which rules, one after another.

`train.phases` holds stretches by name, each with steps, data (`pairs`, `text`, `documents`),
weights of objectives and any other field of `train`: see `configs/coco_flamingo.py`. What a phase
freezes keeps its bits and has no optimizer state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from unified_mm.config import Config, build_options
from unified_mm.costs.flops import matmul_flops
from unified_mm.data.documents import read_documents
from unified_mm.data.interleave import FewShotRows, Layout, packed_rows
from unified_mm.data.mixture import mixture_of
from unified_mm.data.negatives import negatives
from unified_mm.data.pipeline import RECORD
from unified_mm.data.records import Manifest, Record
from unified_mm.default_config import PhaseOptions, TrainOptions, phase
from unified_mm.modalities.interleaved import interleaved_preparers
from unified_mm.objectives.objective import weighted
from unified_mm.parallel.sharding import (
    BATCH,
    BATCH_AXES,
    ParamShardings,
    batch_shards,
    rule_items,
)
from unified_mm.runs.folder import keeps_average
from unified_mm.task import Task
from unified_mm.training.features import kept_in, kept_preparers, with_kept
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.state import TrainState, state_of_phase
from unified_mm.training.step import gradients, make_train_step
from unified_mm.training.treatment import Treatment, treatment_of
from unified_mm.training.update import Optimizer


@dataclass(frozen=True)
class Rows:
    """The rows that a phase reads.

    Attributes:
      examples: the examples, one for each row.
      preparers: what turns an example into arrays, by modality.
      fingerprint: hash of the data.
      numbered: whether a batch says which record each of its examples is of.
    """

    examples: Sequence[Any]
    preparers: Mapping[str, Any]
    fingerprint: str
    numbered: bool = False


@dataclass(frozen=True)
class Phase:
    """One stretch of training, from after step `start` to `stop`.

    Attributes:
      name: the name in `train.phases`, or 'all'.
      start, stop: the last step before the phase, and the phase's last.
      batch_size, micro_batches: examples a step, and the parts that these are split into.
      task: the task with the objectives of the phase.
      rows: the data.
      optimizer: updates what the phase trains.
      placement: shardings of the parameters and what belongs to them.
      abstract: shapes, types and shardings of its state.
      treatment: what changes its gradients beside the optimizer, or None.
      ema_decay: decay of the moving average of parameters; 0 keeps none.
      ema_warmup: whether that decay rises with the steps.
      enter: the state of the phase before, or the first one -> the state that this one begins with.
    """

    name: str
    start: int
    stop: int
    batch_size: int
    micro_batches: int
    task: Task
    rows: Rows
    optimizer: Optimizer
    placement: ParamShardings
    abstract: TrainState
    treatment: Treatment | None
    ema_decay: float
    ema_warmup: bool
    enter: Callable[[TrainState], TrainState]

    def rows_read(self, step: int) -> int:
        """Returns how many rows of this phase were read up to a step of the run."""
        return max(0, min(step, self.stop) - self.start) * self.batch_size

    @cached_property
    def step(self) -> Any:
        """The compiled step of the phase; see `make_train_step`."""
        return make_train_step(
            self.task,
            self.optimizer,
            self.placement,
            self.abstract,
            micro_batches=self.micro_batches,
            treatment=self.treatment,
            ema_decay=self.ema_decay,
            ema_warmup=self.ema_warmup,
        )

    def traced(self) -> Any:
        """Returns the step traced for the arguments that training gives it; that is done once."""
        mesh = self.placement.mesh
        shapes = batch_shapes(self.rows, self.batch_size)
        batch = jax.tree.map(lambda leaf: leaf.update(sharding=NamedSharding(mesh, BATCH)), shapes)
        with jax.set_mesh(mesh), nn.logical_axis_rules(rule_items()):
            return self.step.trace(self.abstract, batch)

    def lowered(self) -> Any:
        """Returns the step as the compiler gets it."""
        traced = self.traced()
        with jax.set_mesh(self.placement.mesh):
            return traced.lower()


def phase_options(config: Config) -> dict[str, PhaseOptions]:
    """Returns the phases of a config by name; those of 0 steps are left out.

    Raises:
      ValueError: an option that is not allowed, or steps that do not add up.
    """
    phases = config.train.phases or {"all": phase(config.train.steps)}
    found = {
        name: build_options(PhaseOptions, phases[name], f"train.phases.{name}")
        for name in sorted(phases)
    }
    total = sum(options.steps for options in found.values())
    if config.train.steps != total:
        raise ValueError(
            f"train.steps={config.train.steps}, but train.phases have {total} steps together: "
            "set train.steps to their sum"
        )
    return {name: options for name, options in found.items() if options.steps}


def build_phases(
    config: Config, task: Task, train: Manifest, abstract: TrainState, placement: ParamShardings
) -> tuple[Phase, ...]:
    """Builds everything that each phase needs.

    Args:
      config: the run's config.
      task: the task with every objective that any phase has.
      train: the records to train on.
      abstract: a state's shapes and shardings, its optimizer apart.
      placement: shardings of the parameters on the run's mesh.

    Raises:
      ValueError: objectives, data or rules that do not exist.
    """
    phases = []
    start = 0
    treatment = treatment_of(config.train)
    for name, options in phase_options(config).items():
        train_options = config.train.changed(options.train)
        given = build_options(TrainOptions, train_options, "train")
        check_batch(given, placement.mesh, task.model.together)
        check_average(name, train_options, config.train)
        optimizer = make_optimizer(
            train_options, options.steps, abstract.params, start, placement.names
        )
        state, enter = state_of_phase(abstract, optimizer, placement)
        objectives = weighted(task.objectives, options.objectives, f"train.phases.{name}")
        rows = phase_rows(config, task, train, options.data)
        if config.data.keep_features and options.data == "pairs":
            kept = kept_preparers(task, rows.examples, abstract.params, optimizer.trained)
            own = {
                name: with_kept(rows.preparers[name], task.modalities[name], each)
                for name, each in kept.items()
            }
            rows = replace(rows, preparers={**rows.preparers, **own})
        if any(getattr(each, "tells_records", False) for each in objectives):
            rows = replace(rows, numbered=True)
        phases.append(
            Phase(
                name=name,
                start=start,
                stop=start + options.steps,
                batch_size=train_options.batch_size,
                micro_batches=train_options.micro_batches,
                task=replace(task, objectives=objectives),
                rows=rows,
                optimizer=optimizer,
                placement=placement,
                abstract=state,
                treatment=treatment,
                ema_decay=config.train.ema_decay,
                ema_warmup=config.train.ema_warmup,
                enter=enter,
            )
        )
        start += options.steps
    refuse_nothing_kept(config, phases)
    return tuple(phases)


def refuse_nothing_kept(config: Config, phases: Sequence[Phase]) -> None:
    """Raises ValueError if features are to be kept and there are none that could be."""
    kept = any(kept_in(each) for phase in phases for each in phase.rows.preparers.values())
    if config.data.keep_features and not kept:
        raise ValueError(
            "data.keep_features=True, but there is nothing to keep: it needs a phase of pairs "
            "whose train.freeze_rules hold a whole tower without dropout or experts, or a whole "
            "stem, of pictures with data.views above 0, or of texts without foils a reader, or the "
            "transformer of late fusion"
        )


def check_average(name: str, options: Config, whole: Config) -> None:
    """Checks that a phase keeps averaged parameters exactly if, and as, the whole run does.

    Raises:
      ValueError: it does not; the message names the phase.
    """
    if keeps_average(options) != keeps_average(whole):
        raise ValueError(
            f"train.phases.{name}.train: optimizer={options.optimizer!r} with ema_decay="
            f"{options.ema_decay} keeps another average than the run: set train.optimizer and "
            "train.ema_decay themselves"
        )
    for field in ("ema_decay", "ema_warmup"):
        if options[field] != whole[field]:
            raise ValueError(
                f"train.phases.{name}.train.{field}={options[field]!r}: the average goes through "
                f"all phases, with train.{field}={whole[field]!r}: set that, and none of a phase"
            )


def check_batch(options: TrainOptions, mesh: Mesh, together: int = 1) -> None:
    """Checks that batches spread evenly over devices and micro-batches, in groups of `together`.

    Raises:
      ValueError: they do not; the message has the numbers.
    """
    rows = batch_shards(mesh)
    if options.batch_size % (rows * options.micro_batches * together):
        experts = f" x groups of {together} examples whose tokens share experts"
        raise ValueError(
            f"train.batch_size={options.batch_size} is not divided by {BATCH_AXES} ({rows}) x "
            f"train.micro_batches ({options.micro_batches})" + experts * (together > 1)
        )


def phase_rows(config: Config, task: Task, train: Manifest, kind: str) -> Rows:
    """Returns the rows of a phase.

    Raises:
      ValueError: documents that do not fit the model or their row.
    """
    if kind == "pairs":
        records, fingerprint = with_negatives(config.data, task, train)
        examples = mixture_of(config.data, records)
        return Rows(examples, task.preparers(train.records), fingerprint)
    if kind == "text":
        blind = tuple(replace(record, parts={}) for record in train.records if record.texts)
        examples = mixture_of(config.data, blind)
        return Rows(examples, task.preparers(blind), train.fingerprint)
    options = config.data.documents
    preparers = interleaved_preparers(task.modalities, options.images, options.length)
    check_places(task, options.length)
    if options.file:
        documents = read_documents(
            options.file, task.modalities, max_bad_share=config.data.max_bad_share
        )
        layout = Layout(options.images, options.length)
        rows = packed_rows(documents.documents, task.tokenizer, layout, config.seed)
        return Rows(rows, preparers, documents.fingerprint)
    if options.images <= options.shots:
        raise ValueError(
            f"data.documents.images={options.images} slots cannot hold {options.shots} examples "
            "and the one that follows them: set it to at least data.documents.shots + 1"
        )
    names = [name for name in task.modalities if name != "text"]
    shots = FewShotRows(
        train.records, options.shots, config.seed, questions=options.questions, of=names
    )
    return Rows(shots, preparers, train.fingerprint)


def with_negatives(data: Any, task: Task, train: Manifest) -> tuple[Sequence[Record], str]:
    """Returns the examples with those of which nothing is to be said, and their fingerprint.

    Files among these count by their names.

    Raises:
      ValueError: `data.negatives` of a mixture, or as `negatives` does.
    """
    share = float(data.negatives)
    if not share:
        if data.negatives_of:
            raise ValueError(
                "data.negatives_of needs data.negatives above 0: the share of examples"
            )
        return train.records, train.fingerprint
    if not 0 < share < 1 or data.source == "mixture":
        raise ValueError(
            f"data.negatives={share:g}: a share of training examples, below 1, and not of a mixture"
        )
    count = round(len(train.records) * share / (1 - share))
    made = negatives(task.modalities, count, data.negatives_of)
    files = [part["file"] for each in made for part in each.parts.values() if "file" in part]
    names = " ".join(["", *(Path(file).name for file in files)])
    sealed = hashlib.sha256(f"{train.fingerprint} {count}{names}".encode()).hexdigest()
    return (*train.records, *made), sealed


def check_places(task: Task, length: int) -> None:
    """Checks that the model has positions for the text of a document's row.

    Raises:
      ValueError: it learns fewer.
    """
    embedding = task.modalities["text"].embedding
    if embedding.learned_positions and length > embedding.max_positions:
        raise ValueError(
            f"data.documents.length={length} text tokens, but the model learns "
            f"{embedding.max_positions} positions: set model.modalities.text.max_positions to at "
            f"least {length}"
        )


def batch_shapes(rows: Rows, size: int) -> dict[str, dict[str, Any]]:
    """Returns shapes and types of a batch [size, ...] without allocating it."""

    def batch() -> Any:
        absent = {name: preparer.absent() for name, preparer in rows.preparers.items()}
        if rows.numbered:
            absent = {name: {**each, RECORD: np.int32(0)} for name, each in absent.items()}
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape)), absent)

    shapes: dict[str, dict[str, Any]] = jax.eval_shape(batch)
    return shapes


def training_flops(phase: Phase) -> int:
    """Counts the FLOPs of the loss and of its gradient by what a phase trains.

    Recomputation is left out.
    """
    plain = phase.task.model.without_recomputation()
    return _gradient_flops(phase, replace(phase.task, model=plain), 1)


def computed_flops(phase: Phase) -> int:
    """Counts the same FLOPs as a step computes them, with recomputation."""
    return _gradient_flops(phase, phase.task, phase.micro_batches)


def _gradient_flops(phase: Phase, task: Task, micro_batches: int) -> int:
    def gradient(params: Any, batch: Any, key: jax.Array) -> Any:
        return gradients(task, phase.optimizer, params, batch, key, micro_batches)[:2]

    with jax.set_mesh(phase.placement.mesh), nn.logical_axis_rules(rule_items()):
        return matmul_flops(
            gradient,
            phase.abstract.params,
            batch_shapes(phase.rows, phase.batch_size),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
