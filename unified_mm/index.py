"""Builds a search index of a folder of images or a COCO set, and searches it.

    python -m unified_mm.index --run=RUN --images=DIR --out=INDEX
    python -m unified_mm.index --run=RUN --index=INDEX --query="a red cube" --top=10
    python -m unified_mm.index --run=RUN --index=INDEX --query_image=photo.jpg
    python -m unified_mm.index --run=RUN --index=INDEX --evaluate

--out and --index are two names of one option. Images are taken from DIR and all folders below it;
if DIR holds annotations/captions_*.json, images and captions of its splits are taken. A command
that was stopped resumes; an existing index is never changed. With both --query and --query_image,
the query is the weighted mean of their embeddings. With --evaluate the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unified_mm.cli.command import command
from unified_mm.cli.flags import refuse_unread
from unified_mm.cli.messages import disk_is_full, new_file, say, score_table
from unified_mm.files import naming, user_path, write_json

if TYPE_CHECKING:
    from unified_mm.inference.loaded import LoadedModel
    from unified_mm.search.search_index import SearchIndex

# What each option is read beside, one at least.
READ_WITH = {
    "split": ("images",),
    "shard": ("images",),
    "exact_up_to": ("images",),
    "kind": ("query", "query_image"),
    "top": ("query", "query_image"),
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
        "shard",
        "exact_up_to",
        "query",
        "query_image",
        "image_weight",
        "kind",
        "top",
        "evaluate",
        "output",
    ),
    split={"action": "append", "help": "of a COCO set; may be repeated; without: all"},
    interrupted="interrupted; the same command goes on from the last whole shard",
)
def main(options: argparse.Namespace) -> int:
    """Builds, searches and evaluates the index, as the flags ask, and returns the exit code."""
    refuse_wrong(options)
    output = new_file(options.output)
    out = user_path(options.out or options.index, "--out").absolute()
    from unified_mm.inference.loaded import load
    from unified_mm.search.search_index import SearchIndex

    # What is wrong with the index or the pictures is said before a model is loaded.
    opened = None if options.images else SearchIndex.open(out)
    pictures = listed(options) if options.images else None
    model = load(options.run, best=options.best)
    if pictures is not None:
        if not written(model, pictures, out, options):
            return 1
        opened = SearchIndex.open(out)
        say(contents(opened))
    assert opened is not None
    opened.check_model(model)
    if options.query is not None or options.query_image is not None:
        search(model, opened, options)
    if options.evaluate:
        evaluate(opened, output)
    return 0


def refuse_wrong(options: argparse.Namespace) -> None:
    """Raises ValueError if the flags ask for nothing, or do not go together."""
    actions = ("images", "query", "query_image", "evaluate")
    if not options.given & set(actions):
        raise ValueError(f"nothing to do: give {' or '.join(f'--{name}' for name in actions)}")
    if bool(options.out) == bool(options.index):
        raise ValueError("give the folder of the index once, as --out or as --index")
    refuse_unread(options, READ_WITH)
    if "image_weight" in options.given and not {"query", "query_image"} <= options.given:
        raise ValueError("--image_weight is read where --query and --query_image are both")
    if options.query is not None and not options.query.strip():
        raise ValueError('--query is empty: --query="what to look for"')


def listed(options: argparse.Namespace) -> Any:
    """Returns the images that `--images` and `--split` name, and prints how many there are."""
    from unified_mm.search.pictures import read_picture_set

    with naming(f"--images={options.images}"):
        pictures = read_picture_set(user_path(options.images, "--images"), options.split)
    captions = sum(map(len, pictures.captions))
    of_splits = f" and {captions:,} captions of {', '.join(pictures.splits)}" * bool(captions)
    say(f"{len(pictures.names):,} pictures{of_splits} in {pictures.folder}")
    return pictures


def written(model: LoadedModel, pictures: Any, out: Path, options: argparse.Namespace) -> bool:
    """Builds the index if it is missing, and returns False, with a message, if the disk is full."""
    from unified_mm.search.index_writer import progress, write_index

    sizes = {"shard": options.shard, "exact_up_to": options.exact_up_to}
    try:
        write_index(model, pictures, out, say, **sizes)
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
    kinds = {"image": "pictures", "text": "captions"}
    held = " and ".join(
        f"{len(nearest):,} {kinds[kind]} ({'all compared' if nearest.graph is None else 'a graph'})"
        for kind, nearest in index.nearest.items()
    )
    return f"index of {held} in {index.path}"


def search(model: LoadedModel, index: SearchIndex, options: argparse.Namespace) -> None:
    """Prints the nearest neighbours of the query."""
    from unified_mm.search.pictures import shown
    from unified_mm.search.search_index import mixed

    weight = options.image_weight
    vectors, weights = [], []
    if options.query is not None:
        vectors.append(model.embed_texts([options.query])[0])
        weights.append(1 - weight)
    if options.query_image is not None:
        with naming(f"--query_image={options.query_image}"):
            vectors.append(model.embed_images([options.query_image])[0])
        weights.append(weight)
    alone = len(vectors) == 1
    query = vectors[0] if alone else mixed(np.stack(vectors), weights)
    for hit in index.search(query, options.top, options.kind):
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
