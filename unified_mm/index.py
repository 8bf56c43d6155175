"""Builds a search index of a folder of images, or other items, or a COCO set, and searches it.

    python -m unified_mm.index --run=RUN --images=DIR --out=INDEX
    python -m unified_mm.index --run=RUN --index=INDEX --query="a red cube" --top=10
    python -m unified_mm.index --run=RUN --index=INDEX --query_image=photo.jpg
    python -m unified_mm.index --run=RUN --index=INDEX --evaluate
    python -m unified_mm.index --run=RUN --images=DIR --out=INDEX --of=tone
    python -m unified_mm.index --run=RUN --index=INDEX --query_item=tone:a.wav

--out and --index are two names of one option. Images are taken from DIR and all folders below it;
if DIR holds annotations/captions_*.json, images and captions of its splits are taken. A command
that was stopped resumes; run again on a folder that has changed, it embeds what is new or changed,
forgets what is gone, and puts the new index in the old one's place when it is whole. With both
--query and --query_image, the query is the weighted mean of their embeddings. With --evaluate the
last line printed is JSON.

Pictures that cannot be read are named and left out. Up to --exact_up_to vectors all are compared;
above that a graph (HNSW, usearch) proposes and exact scores decide. An index is checked byte by
byte when it is opened, and refuses another run or checkpoint than its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unified_mm.cli.command import command
from unified_mm.cli.flags import ANY_MODALITY, refuse_unread
from unified_mm.cli.messages import disk_is_full, new_file, say, score_table
from unified_mm.files import naming, user_path, write_json

if TYPE_CHECKING:
    from unified_mm.inference.loaded import LoadedModel
    from unified_mm.search.items import ItemSet
    from unified_mm.search.search_index import SearchIndex

QUERIES = ("query", "query_image", "query_item")
# What each option is read beside, one at least.
READ_WITH = {
    "split": ("images",),
    "of": ("images",),
    "objective": ("images",),
    "shard": ("images",),
    "exact_up_to": ("images",),
    "kind": QUERIES,
    "top": QUERIES,
    "output": ("evaluate",),
}


@command(
    "index",
    __doc__,
    needs=("run",),
    takes=(
        "best",
        "out",
        "index",
        "images",
        "split",
        "of",
        "objective",
        "shard",
        "exact_up_to",
        "query",
        "query_image",
        "query_item",
        "image_weight",
        "kind",
        "top",
        "evaluate",
        "output",
    ),
    split={"action": "append", "help": "of a COCO set; may be repeated; without: all"},
    of=ANY_MODALITY,
    kind={
        "choices": None,
        "default": "",
        "metavar": "NAME",
        "help": "text, or what --of named",
    },
    interrupted="interrupted; the same command goes on from the last whole shard",
)
def main(options: argparse.Namespace) -> int:
    """Builds, searches and evaluates the index, as the flags ask, and returns the exit code."""
    refuse_wrong(options)
    output = new_file(options.output)
    out = user_path(options.out or options.index, "--out").absolute()
    from unified_mm.inference.loaded import load
    from unified_mm.search.search_index import SearchIndex

    # What is wrong with an index is said before a model is loaded.
    opened = None if options.images else SearchIndex.open(out)
    model = load(options.run, best=options.best)
    if opened is None:
        if not written(model, listed(model, options), out, options):
            return 1
        opened = SearchIndex.open(out)
        say(contents(opened))
    opened.check_model(model)
    if options.given & set(QUERIES):
        search(model, opened, options)
    if options.evaluate:
        evaluate(opened, output)
    return 0


def refuse_wrong(options: argparse.Namespace) -> None:
    """Raises ValueError if the flags ask for nothing, or do not go together."""
    actions = ("images", *QUERIES, "evaluate")
    if not options.given & set(actions):
        raise ValueError(f"nothing to do: give {' or '.join(f'--{name}' for name in actions)}")
    if bool(options.out) == bool(options.index):
        raise ValueError("give the folder of the index once, as --out or as --index")
    refuse_unread(options, READ_WITH)
    items = options.given & {"query_image", "query_item"}
    if "image_weight" in options.given and not ("query" in options.given and items):
        raise ValueError("--image_weight is read where --query and --query_image are both")
    if options.query is not None and not options.query.strip():
        raise ValueError('--query is empty: --query="what to look for"')
    of, colon, file = (options.query_item or "").partition(":")
    if options.query_item is not None and not (of and colon and file):
        raise ValueError(f"--query_item={options.query_item}: give a modality and a file, OF:FILE")


def listed(model: LoadedModel, options: argparse.Namespace) -> ItemSet:
    """Returns the items that `--images`, `--of` and `--split` name, and prints how many."""
    from unified_mm.search.items import read_items

    suffixes = model.in_files(options.of).suffixes
    with naming(f"--images={options.images}"):
        folder = user_path(options.images, "--images")
        items = read_items(folder, options.split, of=options.of, suffixes=suffixes)
    captions = sum(map(len, items.captions))
    of_splits = f" and {captions:,} captions of {', '.join(items.splits)}" * bool(captions)
    say(f"{len(items.names):,} {items.noun}{of_splits} in {items.folder}")
    return items


def written(model: LoadedModel, items: ItemSet, out: Path, options: argparse.Namespace) -> bool:
    """Builds the index if it is missing, and returns False, with a message, if the disk is full."""
    from unified_mm.search.index_writer import progress, write_index

    chosen = {name: getattr(options, name) for name in ("objective", "shard", "exact_up_to")}
    try:
        write_index(model, items, out, say, **chosen)
    except Exception as error:
        if not disk_is_full(error):
            raise
        print(
            f"error: no space left on device for {out}; {progress(out)}. Make room, and the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return False
    return True


def contents(index: SearchIndex) -> str:
    """Returns a line that says what an index holds and how it is searched."""
    from unified_mm.search.items import noun

    held = " and ".join(
        f"{len(nearest):,} {'captions' if kind == 'text' else noun(kind)} "
        f"({'all compared' if nearest.graph is None else 'a graph'})"
        for kind, nearest in index.nearest.items()
    )
    return f"index of {held} in {index.path}"


def search(model: LoadedModel, index: SearchIndex, options: argparse.Namespace) -> None:
    """Prints the nearest neighbours of the query."""
    from unified_mm.search.items import shown
    from unified_mm.search.search_index import mixed

    asked: list[tuple[str, str | Path, float]] = []
    if options.query is not None:
        asked.append(("text", options.query, 1 - options.image_weight))
    pictured = options.query_image and f"image:{options.query_image}"
    for query in filter(None, (pictured, options.query_item)):
        of, _, file = query.partition(":")
        model.in_files(of)
        asked.append((of, Path(file), options.image_weight))
    vectors = [index.embed(model, [item], of)[0] for of, item, _ in asked]
    weights = [weight for *_, weight in asked]
    alone = len(vectors) == 1
    vector = vectors[0] if alone else mixed(np.stack(vectors), weights)
    for hit in index.search(vector, options.top, options.kind):
        of_picture = "" if options.kind != "text" else f"  ({index.rows.names[hit.picture]})"
        say(shown(f"{hit.score:.3f}  {hit.name}{of_picture}"))


def evaluate(index: SearchIndex, output: Path | None) -> None:
    """Prints the scores of the index as a table and as JSON, and writes them to `output`."""
    from unified_mm.search.evaluation import search_scores

    found = search_scores(index)
    result = {
        "scores": found.scores,
        "chance": found.chance,
        "ceiling": {},
        "vectors": {kind: len(nearest) for kind, nearest in index.nearest.items()},
        "graph": {kind: nearest.graph is not None for kind, nearest in index.nearest.items()},
        "left_out": len(index.header["problems"]),
        "step": index.header["model"]["step"],
        "state": index.header.get("state", "last"),  # as all were before `--best`
        "data": {"folder": index.header["folder"], "splits": index.header["splits"]},
    }
    say(score_table(result))
    if output is not None:
        with naming(f"--output={output}"):
            write_json(output, result)
    say(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
