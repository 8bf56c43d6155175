"""What a run needs before its first step: data, tokenizer, task, mesh, and a state's shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from unified_mm.config import Config, build_options, get_field, option, set_field
from unified_mm.data.cleaning import cleaned
from unified_mm.data.manifest import summary, with_foils
from unified_mm.data.records import Manifest
from unified_mm.data.sources import Source, cache_folder, foils_of, open_source
from unified_mm.data.text_tokenizer import TextTokenizer
from unified_mm.default_config import (
    CheckpointOptions,
    LoggingOptions,
    ReadingOptions,
    ScoringOptions,
    TrainOptions,
    defaults,
)
from unified_mm.evaluation.directions import higher_is_better
from unified_mm.evaluation.evaluate import Split
from unified_mm.evaluation.splits import evaluated_splits, open_split, read_manifest
from unified_mm.files import user_path
from unified_mm.modalities.modality import BUILT_IN as MODALITIES
from unified_mm.modalities.modality import build_modalities
from unified_mm.objectives.contrastive import named_modalities
from unified_mm.objectives.objective import BUILT_IN as OBJECTIVES
from unified_mm.parallel.mesh import make_mesh
from unified_mm.parallel.processes import connect, first_before_others, own_rows, refuse_unequal
from unified_mm.parallel.sharding import BATCH_AXES, batch_shards, param_shardings
from unified_mm.registry import resolve
from unified_mm.runs.checkpoints import Checkpoints
from unified_mm.runs.folder import RunFolder, keeps_average
from unified_mm.task import Resources, Task, build_task, load_tokenizer
from unified_mm.training.compilation import Compilation, may_compile_beside
from unified_mm.training.layout import in_training, run_summary
from unified_mm.training.notices import notices
from unified_mm.training.output import framed
from unified_mm.training.phases import Phase, build_phases
from unified_mm.training.sizes import stand_in_tokenizer
from unified_mm.training.start_from import (
    READER,
    begun_parts,
    load_params,
    news_of_start,
    weights_to_start_from,
)
from unified_mm.training.state import TrainState, initial_state, key_of_params
from unified_mm.training.treatment import treatment_of


@dataclass(frozen=True)
class LoopOptions:
    """The options of the training loop, in the config's groups, read before the first step."""

    train: TrainOptions
    logging: LoggingOptions
    checkpoint: CheckpointOptions
    evaluation: ScoringOptions
    data: ReadingOptions
    seed: int = option(least=0, below=2**32)


def plan(
    config: Config, task: Task, mesh: Mesh, train: Manifest
) -> tuple[jax.stages.Wrapped, tuple[Phase, ...]]:
    """Returns a function that makes a run's first state on a mesh, and the run's phases.

    Raises:
      ValueError: a config that cannot be trained, or a mesh that does not divide it.
    """
    init = jax.jit(task.init)
    with jax.set_mesh(mesh):  # and for the same key as where it is called: so it is traced once
        boxed = jax.eval_shape(lambda: init(key_of_params(config.seed)))
    placement = param_shardings(boxed, mesh, config.mesh.zero)
    make_state, abstract = initial_state(
        init,
        placement,
        config.seed,
        averaged=keeps_average(config.train),
        treatment=treatment_of(config.train),
        # Half precision alone needs its loss scaled.
        scale_patience=config.train.scale_patience if config.model.dtype == "float16" else 0,
    )
    trained = in_training(config, task, mesh)
    return make_state, build_phases(config, trained, train, abstract, placement)


def usual_best(config: Config) -> str:
    """Returns the score that the best state is chosen by where the config names none.

    It is '' where nothing that is usual is scored.
    """
    for name, options in config.objectives.items():
        if options.type != "contrastive" or options.weight <= 0:
            continue
        one, *others = named_modalities(options.between, f"objectives.{name}.between")
        if "text" in others:
            return f"single_caption/text_to_{one}/recall_at_1"
        if others:
            return f"{others[0]}_to_{one}/recall_at_1"
    if config.objectives.captioning.weight > 0:
        return "caption/wer" if config.evaluation.transcripts else "caption/cider_d"
    for name, options in config.objectives.items():
        if options.type == "classification" and options.weight > 0:
            return f"{name}/map" if options.many else f"{name}/accuracy"
        if options.type == "transcription" and options.weight > 0:
            return f"{name}/wer"
    return ""


def best_score(config: Config, scored: Any) -> str:
    """Returns the score that the best state is chosen by: the one named, else what is usual.

    Raises:
      ValueError: a state is to be chosen by a score whose direction is not known.
    """
    answered = scored.questions and not scored.captioned
    usual = "answer/accuracy" if answered else usual_best(config)
    name = str(config.evaluation.best_by) or usual
    if config.evaluation.every and name:
        try:
            higher_is_better(name)
        except ValueError as error:
            raise ValueError(f"evaluation.best_by: {error}") from error
    return name


@dataclass(frozen=True)
class Setup:
    """A run, ready for its first step."""

    config: Config
    options: LoopOptions
    best_by: str
    folder: RunFolder
    source: Source
    train: Manifest
    splits: dict[str, Split]
    task: Task
    mesh: Mesh
    make_state: Callable[[], TrainState]
    phases: tuple[Phase, ...]

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all data that is trained on, joined."""
        return "-".join(dict.fromkeys(phase.rows.fingerprint for phase in self.phases))

    def phase_at(self, step: int) -> Phase:
        """Returns the phase that a step (from 1) belongs to.

        Raises:
          ValueError: a step beyond the last.
        """
        for phase in self.phases:
            if step <= phase.stop:
                return phase
        raise ValueError(
            f"the run in {self.folder.path} is at step {step}, beyond train.steps="
            f"{self.options.train.steps}: ask for at least as many steps"
        )


def prepare(
    config: Config, folder: RunFolder, say: Callable[[str], None], *, ahead: bool = False
) -> Setup:
    """Reads the data, builds everything, and prints a summary.

    Args:
      config: of the run.
      folder: of the run.
      say: called with each line.
      ahead: whether the first state is to be made at once, so that its program may be compiled
        while the steps are traced.

    Raises:
      FileNotFoundError: data or a tokenizer that is not there.
      ValueError: data or a config that cannot be trained on.
    """
    options: LoopOptions = build_options(LoopOptions, config, "")
    with first_before_others("data"):  # the others find its caches
        source = open_source(config.data)
        if source.banner:
            say(framed(source.banner))
        if described := getattr(source, "described", ""):
            say(described)
        whole = cleaned(config.data, source.manifest(config.data.train_split))
        tokenizer = run_tokenizer(config, folder, whole)
        task = build_task(config, tokenizer)
        train = read_manifest(config, source, config.data.train_split, task.modalities)
        train = with_asked_foils(task, source, train)
        say(summary(train))
        for line in notices(config, task, train):
            say(line)
        names = evaluated_splits(config, source)
        splits = {name: open_split(config, source, name, task.modalities) for name in names}
        for split in splits.values():
            say(summary(split.manifest))
    check_epochs(config, len(train.records))
    check_records(task, train)
    prompts = [text.prompt for record in train.records for text in record.texts]
    asked = [question.question for split in splits.values() for question in split.questions]
    check_prompts(task, [*prompts, *asked])
    mesh = make_mesh(config.mesh)
    connect(mesh)
    check_evaluation_batch(options.evaluation.batch_size, mesh)
    make_state, phases = plan(config, task, mesh, train)
    best_by = best_score(config, splits[options.evaluation.split])
    brought = weights_to_start_from(config)
    if news := news_of_start(phases[0].abstract.params, config, brought):
        say(news)
    beside = None
    if ahead and may_compile_beside(mesh) and not folder.checkpoints.exists():
        with jax.set_mesh(mesh):
            beside = Compilation(make_state.lower())

    def first_state() -> TrainState:
        """Makes the first state, with the weights of the runs in `model.start_from`."""
        if beside is not None:
            beside.finish()
        state = make_state()
        params = load_params(state.params, config, brought)
        average = state.average
        if average is not None:
            average = jax.tree.map(
                lambda new, old: jax.device_put(jnp.copy(new), old.sharding), params, average
            )
        kept = state.treatment
        if (treatment := phases[0].treatment) is not None:
            where = jax.tree.map(lambda leaf: leaf.sharding, kept)
            kept = jax.jit(treatment.init, out_shardings=where)(params)
        return state.replace(params=params, average=average, treatment=kept)  # type: ignore[attr-defined]

    say(run_summary(mesh, phases))
    setup = Setup(
        config, options, best_by, folder, source, train, splits, task, mesh, first_state, phases
    )
    scored = [split.manifest.fingerprint for split in splits.values()]
    refuse_unequal("the data", " ".join([setup.fingerprint, *scored]))
    reader = task.tokenizer.reader
    refuse_unequal("the tokenizer", task.tokenizer.as_json() + (reader.as_json() if reader else ""))
    return setup


def steps_of_epochs(config: Config, examples: int) -> int:
    """Returns the steps that `train.epochs` are of so many examples, the last batch filled up.

    Raises:
      ValueError: there are phases, which have steps of their own.
    """
    if config.train.phases:
        raise ValueError(
            "train.epochs is for runs of one phase: give train.steps, and the steps of train.phases"
        )
    return max(1, math.ceil(config.train.epochs * examples / config.train.batch_size))


def settle_epochs(config: ConfigDict, asked: Collection[str]) -> None:
    """Sets the steps of a config with `train.epochs`, before anything depends on them.

    Args:
      config: changed in place.
      asked: fields that the command line set.

    Raises:
      ValueError: steps are given beside epochs, or as `steps_of_epochs` does.
    """
    if not config.train.epochs:
        return
    if "train.steps" in asked:
        raise ValueError(
            f"train.epochs={config.train.epochs:g} and train.steps={config.train.steps} both say "
            "how long to train: give one of them"
        )
    chosen = Config(config.to_dict())
    build_options(TrainOptions, chosen.train, "train")
    config.train.steps = steps_of_epochs(chosen, len(read_examples(chosen)[0].records))


def read_examples(config: Config) -> tuple[Manifest, dict[str, Any]]:
    """Returns the training examples, read before a run has its tokenizer, and their modalities."""
    # Texts are never bad: what counts examples needs no tokenizer of this run.
    named = {name: each for name, each in config.model.modalities.items() if name != "text"}
    resources = Resources(config.data, stand_in_tokenizer(config.data.vocabulary_size))
    modalities = build_modalities(named, resources) if named else {}
    with first_before_others("data"):
        source = open_source(config.data)
        return read_manifest(config, source, config.data.train_split, modalities), modalities


def settle_from_data(config: ConfigDict, folder: RunFolder) -> None:
    """Sets the fields that are taken from the training data: classes, means and deviations.

    A run that is there keeps its own.

    Args:
      config: changed in place.
      folder: of the run.

    Raises:
      ValueError: the data cannot be read, or has not what is to be taken from it.
    """
    groups = {
        ("model.modalities", name): ("modality", MODALITIES) for name in config.model.modalities
    }
    groups |= {
        ("objectives", name): ("objective", OBJECTIVES)
        for name, options in config.objectives.items()
        if options.weight > 0
    }
    left_open = {}
    for (group, name), known in groups.items():
        options = get_field(config, group)[name]
        kind = resolve(known[0], options.type, known[1])
        fields = getattr(kind, "from_data", ())
        if fields and not options.get(fields[0]):
            left_open[group, name] = fields
    if not left_open:
        return
    if folder.exists:
        saved = Config(folder.read_config(defaults()))
        for (group, name), fields in left_open.items():
            if name in get_field(saved, group):
                own = get_field(saved, group)[name]
                for field in fields:
                    set_field(config, f"{group}.{name}.{field}", own[field])
        return
    chosen = Config(config.to_dict())
    train, modalities = read_examples(chosen)
    for group, name in left_open:
        options = get_field(chosen, group)[name]
        found = modalities.get(name) if group == "model.modalities" else None
        measuring = found or resolve("objective", options.type, OBJECTIVES).from_config(
            name, options
        )
        for field, value in measuring.measure(train.records).items():
            set_field(config, f"{group}.{name}.{field}", value)


def with_asked_foils(task: Task, source: Source, train: Manifest) -> Manifest:
    """Returns the training examples, with their foils where an objective asks for these.

    Raises:
      ValueError: one asks, and no caption has any.
    """
    if not task.foiled:
        return train
    found = with_foils(train, foils_of(source, train.split))
    if not any(record.foils for record in found.records):
        raise ValueError(
            f"objectives.{task.foiled[0].name}.foils=True, but no caption of {train.split!r} in "
            f"{source.folder} has a foil: write annotations/foils_{train.split}.json there, a list "
            'of {"image_id", "caption", "foil", "kind"}, or set '
            f"--config.objectives.{task.foiled[0].name}.foils=False"
        )
    return found


def check_epochs(config: Config, examples: int) -> None:
    """Checks that the steps are those of `train.epochs`, where there are such.

    Raises:
      ValueError: they are not, or as `steps_of_epochs` does.
    """
    if config.train.epochs and (steps := steps_of_epochs(config, examples)) != config.train.steps:
        raise ValueError(
            f"train.steps={config.train.steps}, but train.epochs={config.train.epochs:g} of "
            f"{examples:,} examples are {steps} steps: set train.steps to that"
        )


def run_tokenizer(config: Config, folder: RunFolder, train: Manifest) -> TextTokenizer:
    """Returns the run's tokenizer: the saved one, else the one given, else one that is trained."""
    given, size = config.data.tokenizer, config.data.vocabulary_size
    if folder.tokenizer.is_file():
        return load_tokenizer(folder.tokenizer, config)
    reader = begun_parts(config).get(READER)
    if given:
        path, named = user_path(given, "data.tokenizer"), config.data.special_tokens
        tokenizer = TextTokenizer.load(path, **named) if reader else load_tokenizer(path, config)
    else:
        kept = cache_folder(config.data) / "tokenizers"
        tokenizer = TextTokenizer.train_once(training_texts(train), size, kept)
    if reader:
        names = config.model.reader["special_tokens"]
        tokenizer.reader = TextTokenizer.load(RunFolder(reader).tokenizer, **names)
    return tokenizer


def training_texts(train: Manifest) -> list[str]:
    """Returns every prompt and every target text."""
    texts = [text for record in train.records for text in record.texts]
    return [part for text in texts for part in (text.prompt, text.target) if part]


def check_records(task: Task, train: Manifest, looked_at: int = 200) -> None:
    """Checks that every declared modality is there in some of the first records.

    Raises:
      ValueError: a modality is in none of them.
    """
    for name, modality in task.modalities.items():
        first = train.records[:looked_at]
        if not any(modality.prepare(record, None)["present"] for record in first):
            raise ValueError(
                f"model.modalities.{name} is declared, but none of the first {len(first)} examples "
                f"in {train.folder} has it"
            )


def check_prompts(task: Task, prompts: Sequence[str]) -> None:
    """Checks that every question leaves room for an answer.

    Raises:
      ValueError: one does not; the message has the longest.
    """
    text = task.modalities.get("text")
    if text is None:
        return
    # No text has more tokens than bytes.
    long = {p for p in prompts if len(p.encode()) + 1 >= text.length}
    sizes = {prompt: len(text.tokenizer.encode_prompt(prompt)) for prompt in long}
    if sizes and (most := max(sizes.values())) >= text.length:
        longest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"the question {longest!r} has {most} tokens and model.modalities.text.length="
            f"{text.length} leaves no room for an answer: set it to at least {most + 4}"
        )


def check_evaluation_batch(size: int, mesh: Mesh) -> None:
    """Checks that evaluation batches spread evenly over devices, and over processes.

    Raises:
      ValueError: they do not; the message has the numbers. Or as `own_rows` does.
    """
    if size % (rows := batch_shards(mesh)):
        raise ValueError(f"evaluation.batch_size={size} is not divided by {BATCH_AXES} ({rows})")
    own_rows(mesh, size)


def check_goes_on(setup: Setup) -> None:
    """Checks that the run in the folder, if any, may go on with this setup; nothing is written.

    Raises:
      ValueError: other data, or fewer steps than were done.
      RunFolderError: another tokenizer.
    """
    if not setup.folder.checkpoints.is_dir():
        return
    with Checkpoints(setup.folder.checkpoints, read_only=True) as checkpoints:
        saved = checkpoints.readable_metadata()
    if saved:
        setup.phase_at(saved["step"])
        check_saved(setup, saved)


def check_saved(setup: Setup, saved: Mapping[str, Any]) -> None:
    """Checks that the data and the tokenizer are those that a checkpoint's metadata names.

    Raises:
      ValueError: other data.
      RunFolderError: another tokenizer.
    """
    began = saved["data_fingerprint"]
    if began != setup.fingerprint:
        raise ValueError(
            f"the data in {setup.source.folder} is not what this run began with (fingerprint "
            f"{setup.fingerprint[:12]}, then {began[:12]}): give the same data, or another "
            "--workdir for a new run"
        )
    setup.folder.check_tokenizer(saved)
