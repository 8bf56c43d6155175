"""The flags of all commands: each has one name, one meaning and one line of help.

A command lists the flags that it reads; any other flag is refused, with the closest match as a
hint. `--config=FILE` and `--config.FIELD=VALUE` go to `ml_collections`, see `cli.recipes`.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from unified_mm.parallel.processes import Cluster


def at_least(
    kind: type, least: float | int, most: float | int = float("inf")
) -> Callable[[str], Any]:
    """Returns a function that parses a number from a flag and refuses it outside its range."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from error
        if not least <= value <= most:
            upper = f" and at most {most}" if most < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}{upper}")
        return value

    return number


def _switch(help: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help}


def _text(metavar: str, help: str, default: str | None = "") -> dict[str, Any]:
    return {"metavar": metavar, "help": help, "default": default, **_read_as(metavar)}


def _number(metavar: str, help: str, default: Any, reads: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": help, "default": default, "type": reads}


def _count(help: str, default: int | None, least: int = 1) -> dict[str, Any]:
    return _number("N", help, default, at_least(int, least))


def _many(metavar: str, help: str) -> dict[str, Any]:
    told = {"metavar": metavar, "help": f"{help}; may be repeated", "action": "append"}
    return {**told, **_read_as(metavar)}


def _read_as(metavar: str) -> dict[str, Any]:
    """Returns how a value is read: shells leave the `~` of `--run=~/runs` to the command."""
    return {"type": os.path.expanduser} if metavar in ("RUN", "DIR", "FILE", "INDEX") else {}


FLAGS: Mapping[str, Mapping[str, Any]] = {
    # Where things lie.
    "config": _text(
        "FILE", "the recipe: coco or a file, with a size coco:base, configs/coco.py:base"
    ),
    "workdir": _text("RUN", "the folder of the run that is trained"),
    "run": _text("RUN", "the folder of a finished run"),
    "exits": _switch("leave out layers and pictures, as `calibrate` found for the run"),
    "best": _switch("take the run's best state on the way (evaluation.every), not its last"),
    "part": {
        "choices": ("image", "text"),
        "help": "one tower of the run alone; without: all of it",
    },
    "out": _text("DIR", "a new folder for what is made"),
    "output": _text("FILE", "a new file for what is measured"),
    "index": _text("INDEX", "the folder of a search index"),
    "from": _text("DIR", "published weights, or their name on the Hub: ORG/MODEL[@REVISION]"),
    "data_dir": _text("DIR", "where the run's data lies now, if elsewhere"),
    "images": _text(
        "DIR", "a folder of pictures, or of files of --of; for classes, one folder each"
    ),
    "image": _many("FILE", "a picture, or a folder with pictures below it"),
    "query_image": _text("FILE", "a picture like what is looked for", None),
    "query_item": _text("OF:FILE", "an item of another modality, such as tone:a.wav", None),
    "objective": _text("NAME", "the contrast in whose space vectors lie; that of --of and text"),
    # What is done, and to what.
    "mode": {
        "choices": ("train", "evaluate", "caption", "search"),
        "default": "train",
        "help": "what is done (train)",
    },
    "split": _text("NAME", "of the data; the run's own evaluation split"),
    "query": _text("TEXT", "what is looked for", None),
    "kind": {"choices": ("image", "text"), "default": "image", "help": "what is listed (image)"},
    "of": {"choices": ("image", "text"), "default": "image", "help": "what is probed (image)"},
    "image_weight": _number(
        "SHARE", "of --query_image beside --query (0.5)", 0.5, at_least(float, 0, 1)
    ),
    "top": _count("how many are listed (10)", 10),
    "evaluate": _switch("score the index"),
    "contribution": _switch("what images tell a captioning model"),
    "max_images": _count("score the first N pictures alone; without: as the run does", None),
    "max_bad_share": _number(
        "SHARE",
        "of pictures that cannot be read, before the folder is refused (0.05)",
        0.05,
        at_least(float, 0, 1),
    ),
    "train": _count("that probes are fitted on (2000)", 2000, 0),
    "asked": _count("that probes are asked about (1000)", 1000, 0),
    "profile": _count("steps that jax.profiler traces into the run's folder; none", 0),
    "tolerance": _number(
        "SHARE",
        "of tokens that may be others, or of captions that may lose by it (0.05)",
        0.05,
        at_least(float, 0, 0.999),
    ),
    "error": _number("SHARE", "the chance that more are (0.05)", 0.05, at_least(float, 1e-9, 1)),
    "pictures": _switch("find the pictures that captions do not need, too"),
    "replace": _switch("replace what the run has of this"),
    "template": _many("TEXT", "a sentence with {} for the class, averaged; without: our own"),
    "topology": _text("NAME", "what is compiled for: v5e:4x4, h100:8, h100:4x8, cpu:8", "v5e:4x4"),
    "phase": _text("NAME", "of train.phases; the first one"),
    "platforms": _text("A,B", "cpu, cuda, rocm, tpu; this machine's"),
    "filter": _many("NAME", "what is looked for, as copies or copies,threshold=20"),
    # How texts are written.
    "prompt": _text("TEXT", "what the text answers; none for a caption"),
    "tokens": _number("N", "written at most; without: as many as the model reads", None, int),
    "prompt_tokens": _number("N", "of a prompt at most; 0: as many as it reads (0)", 0, int),
    "temperature": _number("X", "0 takes the likeliest token (0)", 0.0, float),
    "top_k": _number("N", "draw from the N likeliest; 0: from all (0)", 0, int),
    "top_p": _number("P", "draw from the likeliest P of all (1)", 1.0, float),
    "beams": _number("N", "beam search with so many; 1: none (1)", 1, int),
    "length_penalty": _number("X", "of beams, see inference.decoding (1)", 1.0, float),
    "samples": _number("N", "texts for each picture (1)", 1, int),
    "stop": {**_many("TOKEN", "ends a text"), "default": []},
    "seed": _number("N", "of what is drawn (0)", 0, int),
    "stream": _switch("print each piece as it is written"),
    "json": _switch("a line of JSON for each text"),
    "dtype": {"choices": ("float32", "bfloat16"), "help": "computed in; as the run was trained"},
    "cache": {"choices": ("same", "int8"), "default": "same", "help": "what keys are kept as"},
    "weights": {"choices": ("int8",), "default": "int8", "help": "what weights become (int8)"},
    "activations": {
        "choices": ("int8", "none"),
        "default": "none",
        "help": "int8: what weights are multiplied by is rounded as well (none)",
    },
    # How much at a time.
    "shard": _count("pictures embedded between two writes (256)", 256),
    "shard_megabytes": _number(
        "X", "of pictures that one shard takes (128)", 128.0, at_least(float, 0.001)
    ),
    "exact_up_to": _count("vectors that are all compared; more get a graph (50000)", 50_000, 0),
    "resize": _count("the shorter side in pixels, at most; 0 keeps every file's bytes (0)", 0, 0),
    "quality": _number("Q", "of JPEGs that --resize writes (95)", 95, at_least(int, 1, 100)),
    "sweep": _switch("attention by backend over length, compiling by depth"),
    "inference": _switch("writing, training and answering with a run"),
    "steps": _count("that are timed, after two that warm up (10)", 10, 2),
    "batch": _count("the larger batch (32)", 32, 2),
    "repeats": _count("timed runs of a row (8)", 8, 2),
    # The server.
    "host": _text("HOST", "address to listen at (127.0.0.1: this machine alone)", "127.0.0.1"),
    "port": _number("N", "0 takes a free one (8000)", 8000, at_least(int, 0, 65535)),
    "token_file": _text("FILE", "holds the token that requests bear; or set UNIFIED_MM_TOKEN"),
    "allow_anyone": _switch("listen beyond this machine without a token"),
    "slots": _count("texts written at a time (8)", 8, 1),
    "queue": _count("texts, and embeddings, that wait at most (64)", 64, 1),
    "upload_megabytes": _number("X", "of a request at most (16)", 16.0, float),
    "megapixels": _number("X", "of a picture at most (32)", 32.0, float),
    "seconds": _number("X", "for an answer at most (60)", 60.0, float),
    "drain_seconds": _number("X", "for what is under way at the end (30)", 30.0, float),
    # Several processes that are one run.
    "coordinator": _text("HOST:PORT", "of process 0, where the processes meet"),
    "processes": _number("N", "how many processes there are", None, int),
    "process": _number("I", "which of them this is, from 0", None, int),
    "distributed": _text(
        "HOW",
        "in place of these three: 'auto' asks Slurm, Open MPI, Kubernetes or the TPU; or one by "
        "jax's name: slurm, ompi, mpi4py, gcetpu, gketpu",
    ),
    "start_timeout": _number("S", "seconds until all have met (300)", 300, int),
    "heartbeat_timeout": _number("S", "of silence, then a process is dead (100)", 100, int),
}
# --of where any modality of the run may be named, by those from outside the package too.
ANY_MODALITY = {
    "choices": None,
    "metavar": "NAME",
    "help": "of which modality the items are (image)",
}
CLUSTER = (
    "coordinator",
    "processes",
    "process",
    "distributed",
    "start_timeout",
    "heartbeat_timeout",
)


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as ValueError, printed in one line by `messages.end_with`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def parse(
    command: str,
    doc: str | None,
    arguments: Sequence[str],
    *,
    needs: Collection[str] = (),
    takes: Collection[str] = (),
    names: str = "",
    recipe: str | None = None,
    **changes: Mapping[str, Any],
) -> argparse.Namespace:
    """Parses a command's flags.

    Args:
      command: the name in `python -m unified_mm.COMMAND`.
      doc: the command's help.
      arguments: the arguments as typed, without the program.
      needs: flags that must be given.
      takes: flags that may be given. With `config` in either, the result has the `Recipe` as
        `recipe`.
      names: the name of positional arguments, one or more, if there are any: "runs".
      recipe: the default of --config.
      changes: options of single flags that replace those of `FLAGS`.

    Returns:
      The values by name; `given`: the names that were given; `typed`: the arguments.

    Raises:
      ValueError: if a flag is unknown or missing, or has a wrong value; in one line.
    """
    parser = Parser(
        prog=f"python -m unified_mm.{command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    usual = {}
    for name in (*needs, *takes):
        options = {**FLAGS[name], **changes.get(name, {})}
        usual[name] = options.pop("default", False if options.get("action") else None)
        if options.get("action") == "append":
            usual[name] = usual[name] or []
        parser.add_argument(
            f"--{name}", required=name in needs, default=argparse.SUPPRESS, **options
        )
    if names:
        metavar = names.removesuffix("s").upper()
        parser.add_argument(names, nargs="+", metavar=metavar, **_read_as(metavar))
    found, rest = parser.parse_known_intermixed_args(list(arguments))
    given = vars(found)
    fields = [each for each in rest if each.startswith("--config.")] if "config" in usual else []
    if unknown := _unknown(rest, bool(fields)):
        near = difflib.get_close_matches(unknown.split("=")[0], [f"--{n}" for n in usual], n=1)
        parser.error(f"{unknown} is no flag" + (f"; did you mean {near[0]}?" if near else ""))
    values = argparse.Namespace(
        **{**usual, **given}, given=frozenset(given), typed=tuple(arguments)
    )
    if "config" in usual:
        from unified_mm.cli.recipes import read_recipe  # late: it needs jax, and --help does not

        values.recipe = read_recipe(given.get("config", recipe), rest)
    return values


def _unknown(rest: Sequence[str], fields: bool) -> str | None:
    """Returns the first argument that is neither a config field nor its value, or None."""
    before = ""
    for each in rest:
        value = fields and before.startswith("--config.") and "=" not in before
        if not (fields and each.startswith("--config.")) and not value:
            return each
        before = each
    return None


def refuse_unread(options: argparse.Namespace, read_with: Mapping[str, Collection[str]]) -> None:
    """Raises ValueError if a flag was given without any of the flags that it is read with."""
    for name, others in read_with.items():
        if name in options.given and not options.given & set(others):
            raise ValueError(f"--{name} is read beside --{' or --'.join(others)} alone")


def cluster_of(options: argparse.Namespace) -> Cluster | None:
    """Returns how to connect the processes of a run, None if no flag asks for several.

    Raises:
      ValueError: if flags do not go together.
    """
    if not options.given & set(CLUSTER):
        return None
    from unified_mm.parallel.processes import Cluster

    return Cluster(*(getattr(options, name) for name in CLUSTER))
