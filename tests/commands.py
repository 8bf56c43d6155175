"""The main command within this process, as a user would type it."""

from __future__ import annotations

import sys

import pytest
from absl import app, flags
from ml_collections import config_flags

from unified_mm import main as command
from unified_mm.recipes import parse_flags


def run(*arguments: str) -> int:
    """The exit code of `python -m unified_mm.main ARGUMENTS`."""
    argv = ["unified_mm", *arguments]
    forget_flags()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            try:
                command.main(parse_flags(argv))
            except app.UsageError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)
    code = stopped.value.code
    if isinstance(code, str):  # as the interpreter does with sys.exit("text")
        print(code, file=sys.stderr)
        return 1
    return int(code or 0)


def forget_flags() -> None:
    """A process parses its flags once; a test parses them again, and config fields with them."""
    known = flags.FLAGS
    for name in list(known):
        if name == "config" or name.startswith("config."):
            delattr(known, name)
    known.unparse_flags()
    for name in known:
        known[name].unparse()
    command.CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")


SMALL = (
    "--config.data.image_size=16",
    "--config.data.vocabulary_size=300",
    "--config.model.width=16",
    "--config.model.layers=2",
    "--config.model.unroll=1",
    "--config.model.heads=2",
    "--config.model.feed_forward=32",
    "--config.model.modalities.text.length=12",
    "--config.train.batch_size=8",
    "--config.train.steps=4",
    "--config.train.warmup_steps=1",
    "--config.checkpoint.every=2",
    "--config.logging.every=2",
    "--config.evaluation.batch_size=8",
)
