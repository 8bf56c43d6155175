"""What a run needs before its first step: data, tokenizer, task, mesh, and a state's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from unified_mm.config import Config
from unified_mm.data.manifest import summary
from unified_mm.data.records import Manifest
from unified_mm.data.sources import Source, open_source
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.evaluation.evaluate import Split
from unified_mm.objectives.task import Task, build_task, parameter_counts
from unified_mm.parallel.mesh import make_mesh
from unified_mm.runs.folder import RunFolder
from unified_mm.training.environment import device_name
from unified_mm.training.optimizer import make_optimizer
from unified_mm.training.state import TrainState, initial_state


@dataclass(frozen=True)
class LoopOptions:
    """What the training loop goes by; read from the config before the first step."""

    steps: int
    batch_size: int
    micro_batches: int
    average_decay: float
    log_every: int
    tensorboard: bool
    save_every: int
    keep: int
    asynchronous: bool
    evaluate_every: int
    evaluate_batch: int
    split: str
    best_by: str
    threads: int
    workers: int
    seed: int

    @classmethod
    def from_config(cls, config: Config) -> LoopOptions:
        """Raises ValueError where a number makes no sense."""
        options = cls(
            steps=config.train.steps,
            batch_size=config.train.batch_size,
            micro_batches=config.train.micro_batches,
            average_decay=config.train.average_decay,
            log_every=config.logging.every,
            tensorboard=config.logging.tensorboard,
            save_every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            evaluate_every=config.evaluation.every,
            evaluate_batch=config.evaluation.batch_size,
            split=config.evaluation.split,
            best_by=config.evaluation.best_by,
            threads=config.data.threads,
            workers=config.data.workers,
            seed=config.seed,
        )
        for field, value in (
            ("train.steps", options.steps),
            ("train.batch_size", options.batch_size),
            ("train.micro_batches", options.micro_batches),
            ("logging.every", options.log_every),
            ("checkpoint.every", options.save_every),
            ("checkpoint.keep", options.keep),
            ("evaluation.batch_size", options.evaluate_batch),
        ):
            if value < 1:
                raise ValueError(f"{field}={value}: must be at least 1")
        return options


@dataclass(frozen=True)
class Setup:
    """A run, ready for its first step."""

    config: Config
    options: LoopOptions
    folder: RunFolder
    source: Source
    train: Manifest
    splits: dict[str, Split]
    task: Task
    mesh: Mesh
    make_state: Callable[[], TrainState]
    abstract_state: TrainState
    optimizer: Any


def prepare(config: Config, folder: RunFolder, say: Callable[[str], None]) -> Setup:
    """Reads the data, builds everything, says what there is.

    Raises:
      FileNotFoundError, ValueError: data or a config that cannot be trained on.
    """
    options = LoopOptions.from_config(config)
    source = open_source(config.data)
    if source.banner:
        say(framed(source.banner))
    train = source.manifest(config.data.train_split)
    say(summary(train))
    splits = {name: open_split(config, source, name) for name in evaluated_splits(config, source)}
    for split in splits.values():
        say(summary(split.manifest))
    task = build_task(config, run_tokenizer(config, folder, train))
    check_records(task, train)
    mesh = make_mesh(config.mesh)
    check_batch(options, mesh)
    make_state, abstract, optimizer = initial_state(
        task.init,
        lambda params: make_optimizer(config.train, options.steps, params),
        mesh,
        options.seed,
        averaged=options.average_decay > 0,
    )
    say(inventory(options, mesh, abstract))
    return Setup(
        config, options, folder, source, train, splits, task, mesh, make_state, abstract, optimizer
    )


def evaluated_splits(config: Config, source: Source) -> list[str]:
    """The split that is scored, and those of `evaluation.also` that the data has."""
    there = source.splits()
    wanted = config.evaluation.split
    if wanted not in there:
        raise ValueError(
            f"evaluation.split={wanted!r} is not in {source.folder}, which has "
            f"{', '.join(there)}; choose one of these"
        )
    return [wanted, *(name for name in config.evaluation.also if name in there and name != wanted)]


def open_split(config: Config, source: Source, name: str) -> Split:
    """What is scored of a split, up to `evaluation.max_images`."""
    questions = source.questions(name)
    split = Split(
        source.manifest(name),
        source.foils(name),
        questions,
        source.questions(config.data.train_split) if questions else (),
    )
    return split.first(config.evaluation.max_images)


def run_tokenizer(config: Config, folder: RunFolder, train: Manifest) -> TextTokenizer:
    """The run's own tokenizer: the one kept in it, else one given, else one trained now."""
    given = config.data.tokenizer
    size = config.data.vocabulary_size
    if folder.tokenizer.is_file():
        return TextTokenizer.load(folder.tokenizer)
    if given:
        return TextTokenizer.load(Path(given).expanduser())
    return TextTokenizer.train(training_texts(train), size)


def training_texts(train: Manifest) -> list[str]:
    """Every prompt and every text that is to be written."""
    texts = [text for record in train.records for text in record.texts]
    return [part for text in texts for part in (text.prompt, text.target) if part]


def check_records(task: Task, train: Manifest, looked_at: int = 200) -> None:
    """Every declared modality is there in some of the first records."""
    for name, modality in task.modalities.items():
        first = train.records[:looked_at]
        if not any(modality.prepare(record, None)["present"] for record in first):
            raise ValueError(
                f"model.modalities.{name} is declared, but none of the first {len(first)} examples "
                f"in {train.folder} has it"
            )


def check_batch(options: LoopOptions, mesh: Mesh) -> None:
    """Batches must spread evenly over devices and micro-batches."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch_size % (rows * options.micro_batches):
        raise ValueError(
            f"train.batch_size={options.batch_size} is not divided by mesh.data x mesh.fsdp "
            f"({rows}) x train.micro_batches ({options.micro_batches})"
        )
    if options.evaluate_batch % rows:
        raise ValueError(
            f"evaluation.batch_size={options.evaluate_batch} is not divided by mesh.data x "
            f"mesh.fsdp ({rows})"
        )


def inventory(options: LoopOptions, mesh: Mesh, abstract: TrainState) -> str:
    """Devices, mesh, parameters by part, batch."""
    counts = parameter_counts(abstract.params)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"devices: {device_name()} | mesh: {axes}\n"
        f"parameters: {sum(counts.values()):,} ({parts})\n"
        f"batch: {options.batch_size} examples in {options.micro_batches} part(s), "
        f"{options.steps} steps"
    )


def framed(text: str, width: int = 78) -> str:
    """Text in a box of `#`, for what nobody may overlook."""
    import textwrap

    lines = textwrap.wrap(text, width - 6)
    body = "\n".join(f"## {line:<{width - 6}} ##" for line in lines)
    return f"{'#' * width}\n{body}\n{'#' * width}"
