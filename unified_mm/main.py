"""The main command: trains a run, evaluates it, captions with it, searches with it.

python -m unified_mm.main --config=configs/coco.py --workdir=runs/first
python -m unified_mm.main --mode=evaluate --run=runs/first --split=test_composition
python -m unified_mm.main --mode=caption --run=runs/first --image=photo.jpg
python -m unified_mm.main --mode=search --run=runs/first --query="a red cube"

--config.FIELD=VALUE overrides any field of the config. The same command goes on where a run was
stopped or killed; taken on to more steps, a run keeps its old result as result_STEPS.json. With
--config and --config.data.dir, --mode=evaluate scores a run on other data. Several processes are
one run: --coordinator, --processes and --process, or --distributed, see `parallel.processes`. On a
Linux CPU the command starts itself again with huge pages; UNIFIED_MM_HUGE_PAGES=0 prevents it.
"""

from __future__ import annotations

import gc

from unified_mm.cli.huge_pages import start_again

if __name__ == "__main__":
    start_again("unified_mm.main")
    gc.disable()  # while all that follows is imported: nothing of it is dropped

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from unified_mm.cli.command import command
from unified_mm.cli.flags import CLUSTER, cluster_of
from unified_mm.cli.messages import (
    disk_full,
    disk_is_full,
    is_news,
    new_file,
    say,
    score_table,
)
from unified_mm.cli.recipes import DATA_FIELDS, outside, resolve, settled_fields
from unified_mm.config import Config, get_field
from unified_mm.default_config import defaults
from unified_mm.files import naming, uncollected, user_path, write_json
from unified_mm.parallel.processes import first_before_others, refuse_unequal, start, together
from unified_mm.runs.checkpoints import refuse_name
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

# Which modes read a flag that not all of them do.
READ_BY = {
    "run": ("evaluate", "caption", "search"),
    "best": ("evaluate", "caption", "search"),
    "exits": ("evaluate", "caption"),
    "split": ("evaluate", "search"),
    "image": ("caption",),
    "query": ("search",),
    "images": ("search",),
    "top": ("search",),
    "output": ("evaluate",),
    "profile": ("train",),
    **dict.fromkeys(CLUSTER, ("train", "evaluate")),
}
# Which fields a mode may set other than the run has them; groups with all that they hold. What
# the run's model depends on is not among them: it is as it was trained.
SETTABLE = {
    "evaluate": (
        *DATA_FIELDS,
        "data.train_split",
        "evaluation.split",
        "evaluation.batch_size",
        "evaluation.max_images",
        "evaluation.questions",
        "evaluation.transcripts",
        "evaluation.negatives",
        "evaluation.negatives_of",
        "evaluation.shots",
        "evaluation.few_shot_images",
        "evaluation.few_shot_questions",
    ),
    "search": (*DATA_FIELDS, "evaluation.split", "evaluation.max_images"),
    "caption": (),
}


@command(
    "main",
    __doc__,
    takes=("config", "mode", "workdir", *READ_BY),
    top={"default": 5},
    interrupted="interrupted; the same command goes on from the last checkpoint",
)
def main(options: argparse.Namespace) -> int:
    """Runs the mode that `--mode` names, in all processes of the run together."""
    logging.get_absl_logger().addFilter(is_news)
    return together(lambda: chosen_mode(options))


def chosen_mode(options: argparse.Namespace) -> int:
    """Runs the mode that `--mode` names, and returns its exit code."""
    modes = {"train": train, "evaluate": evaluate, "caption": caption, "search": search}
    refuse_ignored(options)
    options.command = "python -m unified_mm.main " + shlex.join(options.typed)
    options.folder = run_folder(options)
    if (cluster := cluster_of(options)) is not None:
        start(cluster)
    return modes[options.mode](options)


def refuse_ignored(options: argparse.Namespace) -> None:
    """Raises ValueError if flags or fields were given that this mode does not read."""
    for name, modes in READ_BY.items():
        if name in options.given and options.mode not in modes:
            readers = " and ".join(f"--mode={each}" for each in modes)
            raise ValueError(f"--{name} is read by {readers}, not by --mode={options.mode}")
    if "split" in options.given and options.images:
        raise ValueError("--split is not read where --images names what is searched")
    if options.mode == "train":
        return  # there what nothing reads is known once all is built: `refuse_unread`
    able = () if options.images else SETTABLE[options.mode]
    for field in outside(asked_fields(options), able):
        raise ValueError(
            f"{field} cannot be changed here: it belongs to the run and its training, or "
            f"--mode={options.mode} does not read it. It can set {', '.join(able) or 'no field'}"
        )


def asked_fields(options: argparse.Namespace) -> list[str]:
    """Returns the dotted names of the config fields that the command line set."""
    return list(options.recipe.overrides) if options.recipe else []


def run_folder(options: argparse.Namespace) -> str:
    """Returns the run's folder, which every mode needs.

    Raises:
      ValueError: if the folder is given twice or not at all.
    """
    if options.run and options.workdir:
        raise ValueError("--run and --workdir both name the run's folder: give one of them")
    if folder := options.run or options.workdir:
        return str(folder)
    name = "--workdir" if options.mode == "train" else "--run"
    raise ValueError(f"{name}=FOLDER is needed: the run's folder, e.g. runs/first")


def train(options: argparse.Namespace) -> int:
    """Trains and evaluates the run, writes its report and returns the exit code.

    The same command resumes a run that was stopped.
    """
    from unified_mm.evaluation.results import results_beside, write_results
    from unified_mm.runs.environment import or_warn, unseen_accelerator
    from unified_mm.training.loop import NotFinite, Stopped
    from unified_mm.training.output import output_of
    from unified_mm.training.run import train_and_score
    from unified_mm.training.setup import (
        check_goes_on,
        prepare,
        settle_epochs,
        settle_from_data,
    )

    if options.recipe is None:
        raise ValueError("--config is needed to train: --config=configs/coco.py")
    folder = RunFolder(options.folder)
    refuse_name(folder.path)
    output = output_of(folder, say)
    saved = folder.read_config(defaults()) if folder.exists else None
    chosen = resolve(options.recipe, output.say, saved=saved)
    refuse_unequal("the config", shared_fields(chosen))
    settle_epochs(chosen, asked_fields(options))
    settle_from_data(chosen, folder)
    refuse_untrained(folder)
    with output.lock():
        new = folder.check(chosen.to_dict(), defaults())
        if folder.finished and folder.finished_steps() >= chosen.train.steps:
            if options.profile:
                raise ValueError(f"--profile: the run in {folder.path} has no step left")
            shown = folder.report if folder.report.exists() else folder.result
            output.say(f"the run in {folder.path} is finished; see {shown}")
            if other := other_data(saved or {}, chosen):
                output.say(other)
            return 0
        output.say(f"{'new run' if new else 'run'} in {folder.path} (size: {chosen.size})")
        if warning := unseen_accelerator():
            output.say(f"WARNING: {warning}")
        config = Config(chosen.to_dict())
        with uncollected():
            setup = prepare(config, folder, output.say, ahead=True)
        settled = settled_fields(chosen)
        refuse_unread(config, [field for field in asked_fields(options) if field not in settled])
        check_asked(config, setup)
        check_goes_on(setup)
        if folder.metrics.exists():
            read_metrics(folder.metrics)  # says what is wrong with it before anything is written
        try:
            output.begin(config.as_dict(), setup.task.tokenizer)
            result, found = train_and_score(setup, output, traced=options.profile)
            scored, banner = found[config.evaluation.split], setup.source.banner

            def report() -> None:
                from unified_mm.analysis.run_report import write_report  # no step waits for it

                write_report(folder, result, config.as_dict(), scored, banner)

            output.write(lambda: or_warn(f"{folder.report}", report))
            files, place = results_beside(folder.result), setup.source.folder
            output.write(lambda: write_results(files, scored, place))
            output.write(lambda: write_json(folder.result, result))
        except Stopped as stop:
            output.say(f"\n{stop}; to go on, run the same command again:\n  {options.command}")
            return stop.exit_code
        except NotFinite as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except Exception as error:
            if not disk_is_full(error):
                raise
            print(f"error: {disk_full(folder)}", file=sys.stderr)
            return 1
    output.say(score_table(result))
    if setup.source.banner:
        output.say(setup.source.banner)
    if folder.report.exists():
        output.say(f"report: {folder.report}")
    return 0


def other_data(saved: Mapping[str, Any], chosen: ConfigDict) -> str:
    """Returns a line if a finished run was trained on another folder than is asked for, else ''."""
    before, asked = saved.get("data", {}).get("dir", ""), chosen.data.dir
    if (before and os.path.realpath(before)) == (asked and os.path.realpath(asked)):
        return ""
    return (
        f"it was trained on {before or 'data that it found'}, and this command names "
        f"{asked or 'none'}: for other data choose another --workdir"
    )


def refuse_untrained(folder: RunFolder) -> None:
    """Raises ValueError if the run's weights are int8, or imported: training begins elsewhere."""
    saved = folder.saved_config() if folder.exists else {}
    if made := saved.get("quantized"):
        raise ValueError(
            f"{folder.path} holds {made['weights']} weights, which cannot be trained: train the "
            f"run that they were made from ({made['from']}), or start a new one with "
            f"--config.model.start_from.text={folder.path}"
        )
    if imported := saved.get("imported"):
        part = {"both": "whole"}.get(imported["part"], imported["part"])
        raise ValueError(
            f"{folder.path} holds imported weights ({imported['family']}) without the data, the "
            "optimizer and its state that a run goes on with: start a new run with them, in "
            f"another --workdir, with --config.model.start_from.{part}={folder.path}"
        )


def shared_fields(config: ConfigDict) -> str:
    """Returns, as JSON, the config fields that must be equal in all processes of a run.

    Fields that say how a process reads the data may differ.
    """
    fields = config.to_dict()
    own = ("dir", "cache_dir", "threads", "workers")
    data = {name: value for name, value in fields["data"].items() if name not in own}
    return json.dumps({**fields, "data": data}, sort_keys=True)


def check_asked(config: Config, setup: Any) -> None:
    """Raises ValueError if `setup` lacks questions or evaluation images that the config needs."""
    from unified_mm.data.sources import asking_field, refuse_no_questions
    from unified_mm.evaluation.evaluate import check_split

    field, train = asking_field(config.data), setup.train
    if field and not any(text.prompt for record in train.records for text in record.texts):
        refuse_no_questions(setup.source, train.split, field)
    for split in setup.splits.values():
        check_split(split, setup.task)
    name = config.evaluation.split
    if config.evaluation.questions and not setup.splits[name].questions:
        refuse_no_questions(setup.source, name, "evaluation.questions")


def evaluate(options: argparse.Namespace) -> int:
    """Evaluates a run on any data and split, prints the scores and returns the exit code."""
    from unified_mm.data.sources import open_source, refuse_no_questions
    from unified_mm.evaluation.evaluate import evaluate as score
    from unified_mm.evaluation.results import results_beside, write_results
    from unified_mm.evaluation.splits import evaluated_splits, open_split
    from unified_mm.inference.loaded import load
    from unified_mm.training.output import framed, output_of

    file = new_file(options.output)
    beside = {} if file is None else results_beside(file, f"{file.stem}_")
    for each in beside.values():
        new_file(str(each))
    output = output_of(RunFolder(options.folder), say)
    model = load(options.folder, mesh=mesh_of_processes(), best=options.best, exits=options.exits)
    config = run_config(model.config, options)
    with first_before_others("data"):
        source = open_source(config.data)
        if source.banner:
            output.say(framed(source.banner))
        split = open_split(
            config, source, evaluated_splits(config, source)[0], model.task.modalities
        )
    batch_size = config.evaluation.batch_size
    refuse_unread(config, asked_fields(options))
    if config.evaluation.questions and not split.questions:
        refuse_no_questions(source, split.manifest.split, "evaluation.questions")
    found = score(model.predictor, split, batch_size=batch_size)
    for warning in found.warnings:
        output.say(f"WARNING: {warning}")
    if options.exits and any(config.evaluation.shots):
        output.say("scores of examples in context (shots) are of all layers: exits have no part")
    result = {
        "scores": found.scores,
        "chance": found.chance,
        "ceiling": found.ceiling,
        **found.said,
        "split": split.manifest.split,
        "step": model.step,
        "state": model.state,
        **({"exits": model.predictor.exits} if options.exits else {}),
        "data": {"source": source.name, "folder": source.folder, "notice": source.banner},
    }
    output.say(score_table(result))
    if file is not None:
        with naming(f"--output={file}"):
            output.write(lambda: write_results(beside, found, source.folder))
            output.write(lambda: write_json(file, result))
    output.say(json.dumps(result))
    return 0


def mesh_of_processes() -> Any:
    """Returns a mesh of all devices, None if there is only one process."""
    import jax

    from unified_mm.parallel.mesh import make_mesh
    from unified_mm.parallel.processes import connect

    if jax.process_count() == 1:
        return None
    mesh = make_mesh({"data": -1})
    connect(mesh)
    return mesh


def caption(options: argparse.Namespace) -> int:
    """Generates a caption for each image, as `unified_mm.generate` does."""
    from unified_mm import generate

    if not options.image:
        raise ValueError("--mode=caption needs --image=FILE")
    images = [f"--image={file}" for file in options.image]
    switches = ["--best"] * options.best + ["--exits"] * options.exits
    given = [f"--run={options.folder}", *switches, *images]
    return generate.main.work(generate.main.options_of(given))


def search(options: argparse.Namespace) -> int:
    """Prints the images that are closest to the query."""
    import numpy as np

    from unified_mm.data.manifest import problem_counts
    from unified_mm.inference.loaded import load
    from unified_mm.search.items import refuse_without_contrast

    if not (options.query or "").strip():
        raise ValueError('--mode=search needs --query="what to look for"')
    model = load(options.folder, best=options.best)
    refuse_without_contrast(model, "search", "searching")
    paths, embedded, problems = model.embed_files(searched_images(model, options))
    for phrase in problem_counts(problems):
        say(phrase)
    if not paths:
        raise ValueError("none of these images can be read")
    scores = embedded @ model.embed_texts([options.query])[0]
    for place in np.argsort(-scores, kind="stable")[: options.top]:
        say(f"{scores[place]:.3f}  {paths[place]}")
    return 0


def searched_images(model: Any, options: argparse.Namespace) -> list[Any]:
    """Returns the images of `--images`, or of the evaluation split."""
    if not options.images:
        from unified_mm.data.sources import open_source
        from unified_mm.evaluation.splits import evaluated_splits, open_split

        config = run_config(model.config, options)
        source = open_source(config.data)
        name = evaluated_splits(config, source)[0]
        split = open_split(config, source, name, model.task.modalities, with_negatives=False)
        refuse_unread(config, asked_fields(options))
        return [record.image for record in split.manifest.records if record.image]
    from unified_mm.search.items import read_items

    with naming(f"--images={options.images}"):
        found = read_items(user_path(options.images, "--images"))
    return [str(found.folder / name) for name in found.names]


def run_config(saved: Config, options: argparse.Namespace) -> Config:
    """Returns the run's config with the data and evaluation fields that this command sets."""
    fields = saved.as_dict()
    asked = options.recipe.config.to_dict() if options.recipe else {}
    for path in asked_fields(options):
        group, _, last = path.rpartition(".")
        get_field(fields, group)[last] = get_field(asked, path)
    if options.split:
        fields["evaluation"]["split"] = options.split
    return Config(fields)


def refuse_unread(config: Config, fields: list[str]) -> None:
    """Raises ValueError if the user set a field that nothing reads: a mistake, else silent."""
    unread = config.unread(fields)
    if unread:
        raise ValueError(
            f"{', '.join(unread)}: set on the command line, but nothing in this run reads it "
            "(is the objective or modality it belongs to switched on?)"
        )


if __name__ == "__main__":
    gc.enable()
    main(sys.argv[1:])
