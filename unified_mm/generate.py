"""Writes texts about images with a trained run: captions, or answers to a prompt.

    python -m unified_mm.generate --run runs/first --image photo.jpg
    python -m unified_mm.generate --run runs/first --image photo.jpg --prompt "what colour is it?"
    python -m unified_mm.generate --run runs/first --image photo.jpg --temperature 0.8 --samples 3
    python -m unified_mm.generate --run runs/first --image photo.jpg --beams 4 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from unified_mm.commands import parser_of, run_command, say
from unified_mm.models.options import CACHE

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(generate, parse(arguments))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options; argparse ends the process where they are wrong."""
    parser = parser_of("generate", __doc__)
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="the run's folder")
    add("--image", required=True, action="append", metavar="FILE", help="may be repeated")
    add("--prompt", default="", metavar="TEXT", help="what the text answers; none for a caption")
    add("--tokens", type=int, metavar="N", help="the most that are written; as many as it reads")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    add("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: all")
    add("--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest P of all")
    add("--beams", type=int, default=1, metavar="N", help="beam search with so many (1: none)")
    add("--length_penalty", type=float, default=1.0, help="of beams: see inference.decoding (1)")
    add("--samples", type=int, default=1, metavar="N", help="texts for each image (1)")
    add("--stop", action="append", default=[], metavar="TOKEN", help="ends a text; repeatable")
    add("--seed", type=int, default=0, help="of what is drawn (0)")
    add("--stream", action="store_true", help="print each piece as it is written")
    add("--json", action="store_true", help="a line of JSON for each text")
    add("--dtype", choices=DTYPES, help="to compute in; as the run was trained")
    add("--cache", choices=CACHE, default=CACHE[0], help="what keys and values are kept as")
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> int:
    """Prints what the run writes about each image."""
    from unified_mm.inference.decoding import Decoding
    from unified_mm.inference.loaded import load

    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(options.stop)})
    if options.stream and (options.samples > 1 or options.beams > 1 or options.json):
        raise ValueError("--stream prints one text: give no --samples, --beams or --json")
    model = load(options.run)
    changes: dict[str, Any] = {"cache": options.cache}
    if options.dtype:
        changes["dtype"] = options.dtype
    model = model.with_options(**changes)
    if options.stream:
        for image in options.image:
            print(f"{image}: ", end="", flush=True)
            for piece in model.stream(image, options.prompt, decoding):
                print(piece, end="", flush=True)
            print()
        return 0
    prompts = [options.prompt] * len(options.image)
    written = model.generate(options.image, prompts, decoding)
    for image, texts in zip(options.image, written, strict=True):
        for text in texts:
            if options.json:
                say(json.dumps({"image": image, "text": text.text, "nats": text.log_likelihood}))
            else:
                say(f"{image}: {text.text}")
    return 0


if __name__ == "__main__":
    main()
