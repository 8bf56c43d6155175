"""The main command: train a run, evaluate it, caption with it, search with it.

    python -m unified_mm.main --config=configs/coco.py --workdir=runs/first
    python -m unified_mm.main --mode=evaluate --workdir=runs/first --split=test_composition
    python -m unified_mm.main --mode=caption --workdir=runs/first --image=photo.jpg
    python -m unified_mm.main --mode=search --workdir=runs/first --query="a red cube"
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from unified_mm import cluster_flags
from unified_mm.commands import (
    disk_full,
    disk_is_full,
    exit_code,
    is_news,
    new_file,
    say,
    score_table,
)
from unified_mm.config import Config
from unified_mm.default_config import defaults
from unified_mm.files import naming, user_path, write_json
from unified_mm.parallel.processes import first_before_others, refuse_unequal, start, together
from unified_mm.recipes import (
    DATA_FIELDS,
    outside,
    overridden,
    parse_flags,
    resolve,
    settled_fields,
)
from unified_mm.runs.folder import RunFolder
from unified_mm.runs.metrics import read_metrics

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe: configs/coco.py, or with a size, configs/coco.py:base."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "caption", "search"], "What to do.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.")
SPLIT = flags.DEFINE_string("split", "", "evaluate, search: the split; '' is the config's own.")
IMAGE = flags.DEFINE_multi_string("image", [], "caption: an image file; may be repeated.")
QUERY = flags.DEFINE_string("query", "", "search: what to look for.")
IMAGES = flags.DEFINE_string("images", "", "search: a folder; '' is the run's evaluation split.")
TOP = flags.DEFINE_integer("top", 5, "search: how many images to show.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "", "evaluate: a new JSON file for the scores.")

# Which modes read a flag that not all of them do.
READ_BY = {
    "split": ("evaluate", "search"),
    "image": ("caption",),
    "query": ("search",),
    "images": ("search",),
    "top": ("search",),
    "output": ("evaluate",),
    **dict.fromkeys(cluster_flags.FLAGS, ("train", "evaluate")),
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
        "evaluation.shots",
        "evaluation.few_shot_images",
        "evaluation.few_shot_questions",
    ),
    "search": (*DATA_FIELDS, "evaluation.split", "evaluation.max_images"),
    "caption": (),
}


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells each of its steps otherwise
    logging.get_absl_logger().addFilter(is_news)
    again = "interrupted; the same command goes on from the last checkpoint"
    sys.exit(together(lambda: exit_code(lambda: chosen_mode(argv[1:]), interrupted=again)))


def chosen_mode(rest: list[str]) -> int:
    """What `--mode` asks for; `rest` is what the flags' parser left over."""
    modes = {"train": train, "evaluate": evaluate, "caption": caption, "search": search}
    if rest:
        raise ValueError(f"not a flag: {' '.join(rest)}")
    refuse_ignored()
    workdir()
    if (cluster := cluster_flags.cluster_from_flags()) is not None:
        start(cluster)
    return modes[MODE.value]()


def refuse_ignored() -> None:
    """Raises ValueError for flags and fields that were given and that this mode does not read."""
    mode = MODE.value
    for name, modes in READ_BY.items():
        if flags.FLAGS[name].present and mode not in modes:
            readers = " and ".join(f"--mode={each}" for each in modes)
            raise ValueError(f"--{name} is read by {readers}, not by --mode={mode}")
    if flags.FLAGS["split"].present and IMAGES.value:
        raise ValueError("--split is not read where --images names what is searched")
    if mode == "train":
        return  # there what nothing reads is known once all is built: `refuse_unread`
    able = () if IMAGES.value else SETTABLE[mode]
    for field in outside(asked_fields(), able):
        raise ValueError(
            f"{field} cannot be changed here: it belongs to the run and its training, or "
            f"--mode={mode} does not read it. It can set {', '.join(able) or 'no field'}"
        )


def asked_fields() -> list[str]:
    """Dotted names of the config fields that the command line set."""
    return [] if CONFIG.value is None else overridden(flags.FLAGS["config"])


def workdir() -> str:
    """The run's folder, which every mode needs."""
    if not WORKDIR.value:
        raise ValueError("--workdir=FOLDER is needed: the run's folder, e.g. runs/first")
    return WORKDIR.value


def train() -> int:
    """Trains, scores, reports; running it again resumes."""
    from unified_mm.analysis.run_report import write_report
    from unified_mm.training.environment import unseen_accelerator
    from unified_mm.training.loop import NotFinite, Stopped
    from unified_mm.training.output import output_of
    from unified_mm.training.run import train_and_score
    from unified_mm.training.setup import check_goes_on, prepare

    if CONFIG.value is None:
        raise ValueError("--config is needed to train: --config=configs/coco.py")
    folder = RunFolder(workdir())
    output = output_of(folder, say)
    chosen = resolve(CONFIG.value, flags.FLAGS["config"], output.say)
    refuse_unequal("the config", shared_fields(chosen))
    refuse_int8(folder)
    with output.lock():
        new = folder.check(chosen.to_dict(), defaults())
        if folder.finished and folder.finished_steps() >= chosen.train.steps:
            output.say(f"the run in {folder.path} is finished; see {folder.report}")
            return 0
        output.say(f"{'new run' if new else 'run'} in {folder.path} (size: {chosen.size})")
        if warning := unseen_accelerator():
            output.say(f"WARNING: {warning}")
        config = Config(chosen.to_dict())
        setup = prepare(config, folder, output.say)
        settled = settled_fields(chosen)
        refuse_unread(config, [field for field in asked_fields() if field not in settled])
        check_asked(config, setup)
        check_goes_on(setup)
        if folder.metrics.exists():
            read_metrics(folder.metrics)  # says what is wrong with it before anything is written
        try:
            output.begin(config.as_dict(), setup.task.tokenizer)
            result, found = train_and_score(setup, output)
            scored, banner = found[config.evaluation.split], setup.source.banner
            output.write(lambda: write_report(folder, result, config.as_dict(), scored, banner))
            output.write(lambda: write_json(folder.result, result))
        except Stopped as stop:
            output.say(f"\n{stop}; to go on, run the same command again:\n  {command()}")
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
    output.say(f"report: {folder.report}")
    return 0


def refuse_int8(folder: RunFolder) -> None:
    """Raises ValueError where the run's weights are int8, which no gradient can change."""
    made = folder.saved_config().get("quantized") if folder.exists else None
    if made:
        raise ValueError(
            f"{folder.path} holds {made['weights']} weights, which cannot be trained: train the "
            f"run that they were made from ({made['from']}), or start a new one with "
            f"--config.model.start_from.text={folder.path}"
        )


def shared_fields(config: ConfigDict) -> str:
    """What all processes of a run must be told alike: not how each gets at the data."""
    fields = config.to_dict()
    own = ("dir", "cache_dir", "threads", "workers")
    data = {name: value for name, value in fields["data"].items() if name not in own}
    return json.dumps({**fields, "data": data}, sort_keys=True)


def check_asked(config: Config, setup: Any) -> None:
    """Raises ValueError where `setup` lacks questions, or images to score, that the config asks."""
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


def evaluate() -> int:
    """Scores a run on any data and split."""
    from unified_mm.data.sources import open_source, refuse_no_questions
    from unified_mm.evaluation.evaluate import evaluate as score
    from unified_mm.inference.loaded import load
    from unified_mm.training.output import framed, output_of
    from unified_mm.training.setup import evaluated_splits, open_split

    file = new_file(OUTPUT.value)
    output = output_of(RunFolder(workdir()), say)
    model = load(workdir(), mesh=mesh_of_processes())
    config = run_config(model.config)
    with first_before_others("data"):
        source = open_source(config.data)
        if source.banner:
            output.say(framed(source.banner))
        split = open_split(config, source, evaluated_splits(config, source)[0])
    batch_size = config.evaluation.batch_size
    refuse_unread(config, asked_fields())
    if config.evaluation.questions and not split.questions:
        refuse_no_questions(source, split.manifest.split, "evaluation.questions")
    found = score(model.predictor, split, batch_size=batch_size)
    result = {
        "scores": found.scores,
        "chance": found.chance,
        "ceiling": found.ceiling,
        "split": split.manifest.split,
        "step": model.step,
        "data": {"source": source.name, "folder": source.folder, "notice": source.banner},
    }
    output.say(score_table(result))
    if file is not None:
        with naming(f"--output={file}"):
            output.write(lambda: write_json(file, result))
    output.say(json.dumps(result))
    return 0


def mesh_of_processes() -> Any:
    """All devices, where several processes share the work; None where this one is alone."""
    import jax

    from unified_mm.parallel.mesh import make_mesh
    from unified_mm.parallel.processes import connect

    if jax.process_count() == 1:
        return None
    mesh = make_mesh({"data": -1})
    connect(mesh)
    return mesh


def caption() -> int:
    """Writes a caption for each image."""
    from unified_mm.inference.loaded import load

    if not IMAGE.value:
        raise ValueError("--mode=caption needs --image=FILE")
    for path, text in zip(IMAGE.value, load(workdir()).caption(IMAGE.value), strict=True):
        say(f"{path}: {text}")
    return 0


def search() -> int:
    """Lists the images that fit the query best."""
    import numpy as np

    from unified_mm.data.manifest import problem_counts
    from unified_mm.inference.loaded import load

    if not QUERY.value.strip():
        raise ValueError('--mode=search needs --query="what to look for"')
    model = load(workdir())
    paths, embedded, problems = model.embed_files(searched_images(model.config))
    for phrase in problem_counts(problems):
        say(phrase)
    if not paths:
        raise ValueError("none of these images can be read")
    scores = embedded @ model.embed_texts([QUERY.value])[0]
    for place in np.argsort(-scores, kind="stable")[: TOP.value]:
        say(f"{scores[place]:.3f}  {paths[place]}")
    return 0


def searched_images(saved: Config) -> list[Any]:
    """Images of `--images`, or of the evaluation split."""
    if not IMAGES.value:
        from unified_mm.data.sources import open_source
        from unified_mm.training.setup import evaluated_splits, open_split

        config = run_config(saved)
        source = open_source(config.data)
        split = open_split(config, source, evaluated_splits(config, source)[0])
        refuse_unread(config, asked_fields())
        return [record.image for record in split.manifest.records if record.image]
    folder = user_path(IMAGES.value, "--images")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--images={folder} is no folder")
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
    with naming(f"--images={folder}"):
        found = sorted(
            str(path)
            for path in folder.rglob("*")
            if path.suffix.lower() in kinds and path.is_file()
        )
    if not found:
        raise FileNotFoundError(f"--images={folder} holds no image ({', '.join(sorted(kinds))})")
    return found


def run_config(saved: Config) -> Config:
    """A run's config with the data and evaluation fields that this command sets."""
    fields = saved.as_dict()
    asked = {} if CONFIG.value is None else CONFIG.value.to_dict()
    for path in asked_fields():
        node, source = fields, asked
        *parents, last = path.split(".")
        for name in parents:
            node, source = node[name], source[name]
        node[last] = source[last]
    if SPLIT.value:
        fields["evaluation"]["split"] = SPLIT.value
    return Config(fields)


def refuse_unread(config: Config, fields: list[str]) -> None:
    """A field that the user set and nothing reads would be a silent mistake."""
    unread = config.unread(fields)
    if unread:
        raise ValueError(
            f"{', '.join(unread)}: set on the command line, but nothing in this run reads it "
            "(is the objective or modality it belongs to switched on?)"
        )


def command() -> str:
    """This command, to be pasted."""
    import shlex

    return "python -m unified_mm.main " + " ".join(map(shlex.quote, sys.argv[1:]))


def run() -> None:
    """The entry point: flags, then `main`."""
    for stream in (sys.stdout, sys.stderr):  # names and texts that the terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
