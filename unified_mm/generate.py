"""Generates texts about images with a trained run: captions, or answers to a prompt.

python -m unified_mm.generate --run runs/first --image photo.jpg
python -m unified_mm.generate --run runs/first --image photo.jpg --prompt "what colour is it?"
python -m unified_mm.generate --run runs/first --image photo.jpg --temperature 0.8 --samples 3
python -m unified_mm.generate --run runs/first --image photo.jpg --beams 4 --json
python -m unified_mm.generate --run runs/first --image DIR --output new.json

--image may be a folder: its pictures and those of all folders below it are taken, as `index` takes
them, and of a COCO set those of its splits. Pictures that cannot be read are named and left out.
--output writes COCO's results: a list of {"image_id", "file_name", "caption"}, or after a --prompt
of {"image_id", "file_name", "question", "answer"}; an image that no COCO set numbers has its name
as its id. Where Ctrl-C or an error ends the command, it holds what was written so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unified_mm.cli.command import command
from unified_mm.cli.messages import new_file, say
from unified_mm.files import naming, user_path, write_json

if TYPE_CHECKING:
    from unified_mm.inference.decoding import Decoding, Written
    from unified_mm.inference.loaded import LoadedModel

DTYPES = ("float32", "bfloat16")


class Picture(NamedTuple):
    """A picture that a text is written about.

    Attributes:
      path: its file.
      name: the same as it is listed: within the folder that was given, if one was.
      id: of a COCO set, else the name.
    """

    path: str
    name: str
    id: int | str


@command(
    "generate",
    __doc__,
    needs=("run", "image"),
    takes=(
        "best",
        "exits",
        "prompt",
        "tokens",
        "temperature",
        "top_k",
        "top_p",
        "beams",
        "length_penalty",
        "samples",
        "stop",
        "seed",
        "stream",
        "json",
        "dtype",
        "cache",
        "output",
    ),
    output={"help": "a new file for COCO's results in JSON"},
)
def main(options: argparse.Namespace) -> int:
    """Generates texts for each image, prints them and returns the exit code.

    Raises:
      ValueError: if a flag is out of range, flags do not go together, or no picture can be read.
    """
    from unified_mm.inference.decoding import Decoding
    from unified_mm.inference.loaded import load
    from unified_mm.training.signals import StopRequest, stop_on_signals

    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(options.stop)})
    if options.stream and (options.samples > 1 or options.beams > 1 or options.json):
        raise ValueError("--stream prints one text: give no --samples, --beams or --json")
    if options.stream and options.output:
        raise ValueError("--stream prints each piece at once: give no --output beside it")
    output = new_file(options.output)
    pictures = listed(options.image)
    model = load(options.run, best=options.best, exits=options.exits)
    changes: dict[str, Any] = {"cache": options.cache}
    if options.dtype:
        changes["dtype"] = options.dtype
    model = model.with_options(**changes)
    if options.stream:
        stream(model, pictures, options.prompt, decoding)
        return 0
    results: list[dict[str, Any]] = []
    empty = 0
    stop = StopRequest(unsaved=lambda: bool(results))
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(kept(results, output))
            stack.enter_context(stop_on_signals(stop))
        told = written(model, pictures, options.prompt, decoding, lambda: stop.signal is not None)
        for picture, texts in told:
            for text in texts:
                results.append(result(picture, options.prompt, text.text))
                if options.json:
                    said = {"image": picture.path, "text": text.text, "nats": text.log_likelihood}
                    say(json.dumps(said))
                else:
                    say(shown(f"{picture.path}: {text.text}"))
                empty += not text.text
    if empty:
        print(
            f"{empty:,} of {len(results):,} texts are empty: the model ended them at once, as one "
            f"does that has learned little; this one was trained for {model.step:,} steps",
            file=sys.stderr,
        )
    if stop.signal is None:
        return 0
    print(f"interrupted: --output={output} holds what was written so far", file=sys.stderr)
    return stop.exit_code


@contextmanager
def kept(results: Sequence[dict[str, Any]], output: Path) -> Iterator[None]:
    """Writes the results that there are when the body ends, however it does."""
    try:
        yield
    finally:
        if results:
            with naming(f"--output={output}"):
                write_json(output, results)
            say(f"{len(results):,} texts in {output}")


def listed(images: Sequence[str]) -> list[Picture]:
    """Returns the pictures that `--image` names, each a file or a folder."""
    from unified_mm.search.items import read_items

    pictures = []
    for image in images:
        path = user_path(image, "--image")
        if not path.is_dir():
            pictures.append(Picture(image, image, image))
            continue
        with naming(f"--image={image}"):
            items = read_items(path)
        found = zip(items.names, items.ids, strict=True)
        pictures += [Picture(os.path.join(image, name), name, id) for name, id in found]
    return pictures


def written(
    model: LoadedModel,
    pictures: Sequence[Picture],
    prompt: str,
    decoding: Decoding,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Picture, list[Written]]]:
    """Yields each picture that can be read with its texts; a batch is in memory at a time.

    Between two batches it ends where `stopped`.

    Raises:
      ValueError: none can be read.
    """
    from tqdm import tqdm

    from unified_mm.inference.loaded import BATCH

    parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    files = [[Path(each.path) for each in part] for part in parts]
    read = model.read_ahead(files, model.told_about)
    left_out = done = 0
    # For a few pictures a bar would only stand between their texts.
    hidden = True if len(parts) == 1 else None
    with tqdm(total=len(pictures), desc="writing", unit="picture", disable=hidden) as bar:
        for part, rows in zip(parts, read, strict=True):
            if stopped():
                return
            found = []
            for picture, row in zip(part, rows, strict=True):
                if isinstance(row, str):
                    left_out += 1
                    print(shown(f"left out: {picture.path}: {row}"), file=sys.stderr)
                else:
                    found.append((picture, row[0]))
                    if len(row) > 1:
                        said = f"longer than the model hears, its beginning alone: {picture.path}"
                        print(shown(said), file=sys.stderr)
            texts = model.generate_rows(
                [row for _, row in found], [prompt] * len(found), decoding, first=done
            )
            done += len(found)
            yield from zip((picture for picture, _ in found), texts, strict=True)
            bar.update(len(part))
    refuse_nothing(model, pictures, left_out)


def stream(
    model: LoadedModel, pictures: Sequence[Picture], prompt: str, decoding: Decoding
) -> None:
    """Prints the text of each picture that can be read in pieces, as it is written."""
    from unified_mm.data.images import ImageError

    left_out = 0
    for picture in pictures:
        try:
            pieces = model.stream(Path(picture.path), prompt, decoding)
        except (FileNotFoundError, ImageError) as error:
            left_out += 1
            print(shown(f"left out: {error}"), file=sys.stderr)
            continue
        print(shown(f"{picture.path}: "), end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    refuse_nothing(model, pictures, left_out)


def refuse_nothing(model: LoadedModel, pictures: Sequence[Picture], left_out: int) -> None:
    """Says how many pictures were left out; raises the first one's error if it was all of them."""
    if left_out == len(pictures):
        model.read(Path(pictures[0].path), model.told_about)
    if left_out:
        print(f"{left_out:,} of {len(pictures):,} pictures were left out", file=sys.stderr)


def result(picture: Picture, prompt: str, text: str) -> dict[str, Any]:
    """Returns an entry of COCO's results: of a caption, or of an answer with its question."""
    said = {"question": prompt, "answer": text} if prompt else {"caption": text}
    return {"image_id": picture.id, "file_name": shown(picture.name), **said}


def shown(text: str) -> str:
    """Returns a text that can be printed, whatever bytes the names in it have."""
    from unified_mm.search import items

    return items.shown(text)


if __name__ == "__main__":
    main(sys.argv[1:])
