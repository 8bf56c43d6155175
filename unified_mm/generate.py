"""Generates texts about images with a trained run: captions, or answers to a prompt.

python -m unified_mm.generate --run runs/first --image photo.jpg
python -m unified_mm.generate --run runs/first --image photo.jpg --prompt "what colour is it?"
python -m unified_mm.generate --run runs/first --image photo.jpg --temperature 0.8 --samples 3
python -m unified_mm.generate --run runs/first --image photo.jpg --beams 4 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from unified_mm.cli.command import command
from unified_mm.cli.messages import say

DTYPES = ("float32", "bfloat16")


@command(
    "generate",
    __doc__,
    needs=("run", "image"),
    takes=(
        "best",
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
    ),
)
def main(options: argparse.Namespace) -> int:
    """Generates texts for each image, prints them and returns the exit code.

    Raises:
      ValueError: if a flag is out of range, or flags do not go together.
    """
    from unified_mm.inference.decoding import Decoding
    from unified_mm.inference.loaded import load

    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(options.stop)})
    if options.stream and (options.samples > 1 or options.beams > 1 or options.json):
        raise ValueError("--stream prints one text: give no --samples, --beams or --json")
    model = load(options.run, best=options.best)
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
    main(sys.argv[1:])
